"""Subspace optimizers: one engine, one short recipe per published method.

optimizer = subspan.optim.GaLore(model.named_parameters(), lr=0.01, rank=128)
optimizer = subspan.optim.for_model(model, method="fira", lr=0.01, rank=128)
"""

from subspan.optim.composition import Composition
from subspan.optim.effopd import EffOPD
from subspan.optim.engine import SubspaceOptimizer
from subspan.optim.model import for_model
from subspan.optim.parts.polynomial import Curvature
from subspan.optim.placing import shard_placement
from subspan.optim.recipes import (
    APOLLO,
    COAP,
    FISMO,
    FRUGAL,
    GUM,
    SARA,
    SGD,
    SWATS,
    AdamSNSM,
    AdamW,
    APOLLOMini,
    AuON,
    BAdam,
    DCTAdamW,
    Fira,
    Flora,
    GaLore,
    GaLore2,
    GaLorePlus,
    GrassJump,
    GrassWalk,
    HybridAuON,
    LDAdam,
    Muon,
    OnlineSubspaceDescent,
    Polynomial,
    QGaLore,
    SubsetNorm,
    SubspaceMomentum,
    SubTrackPP,
    TensorGaLore,
    Trion,
)
from subspan.optim.registry import Composed, Recipe, build, lookup, methods, recipe
from subspan.optim.selection import param_groups_for_model
from subspan.subspaces.ranks import EnergyRank

__all__ = [
    "APOLLO",
    "COAP",
    "FISMO",
    "FRUGAL",
    "GUM",
    "SARA",
    "SGD",
    "SWATS",
    "APOLLOMini",
    "AdamSNSM",
    "AdamW",
    "AuON",
    "BAdam",
    "Composed",
    "Composition",
    "Curvature",
    "DCTAdamW",
    "EffOPD",
    "EnergyRank",
    "Fira",
    "Flora",
    "GaLore",
    "GaLore2",
    "GaLorePlus",
    "GrassJump",
    "GrassWalk",
    "HybridAuON",
    "LDAdam",
    "Muon",
    "OnlineSubspaceDescent",
    "Polynomial",
    "QGaLore",
    "Recipe",
    "SubTrackPP",
    "SubsetNorm",
    "SubspaceMomentum",
    "SubspaceOptimizer",
    "TensorGaLore",
    "Trion",
    "build",
    "for_model",
    "lookup",
    "methods",
    "param_groups_for_model",
    "recipe",
    "shard_placement",
]
