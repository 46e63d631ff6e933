"""A fair race of several methods on one job: search, halving, seeds, processes, results."""
