"""Train, adapt, merge, edit and inspect large neural networks inside low-rank subspaces."""

__version__ = "0.1.0"
