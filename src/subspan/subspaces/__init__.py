"""Subspaces of matrices: what represents them, how to find them, and their geometry."""

from .bases import (
    Coordinates,
    Dense,
    Entries,
    OneSided,
    Seeded,
    Subspace,
    TwoSided,
    Whole,
)
from .fixed_columns import FixedColumns
from .geometry import (
    align_signs,
    captured_energy,
    geodesic,
    horizontal,
    principal_angles,
    procrustes,
)

__all__ = [
    "Coordinates",
    "Dense",
    "Entries",
    "FixedColumns",
    "OneSided",
    "Seeded",
    "Subspace",
    "TwoSided",
    "Whole",
    "align_signs",
    "captured_energy",
    "geodesic",
    "horizontal",
    "principal_angles",
    "procrustes",
]
