"""Subspace optimizers: one engine, one short recipe per published method.

optimizer = subspan.optim.GaLore(model.named_parameters(), lr=0.01, rank=128)
optimizer = subspan.optim.for_model(model, method="fira", lr=0.01, rank=128)
"""

from subspan.optim.composition import Composition
from subspan.optim.engine import SubspaceOptimizer
from subspan.optim.model import for_model
from subspan.optim.recipes import (
    APOLLO,
    FRUGAL,
    AdamW,
    APOLLOMini,
    Fira,
    Flora,
    GaLore,
    LDAdam,
)
from subspan.optim.registry import Composed, Recipe, build, lookup, methods, recipe
from subspan.optim.selection import param_groups_for_model

__all__ = [
    "APOLLO",
    "FRUGAL",
    "APOLLOMini",
    "AdamW",
    "Composed",
    "Composition",
    "Fira",
    "Flora",
    "GaLore",
    "LDAdam",
    "Recipe",
    "SubspaceOptimizer",
    "build",
    "for_model",
    "lookup",
    "methods",
    "param_groups_for_model",
    "recipe",
]
