"""Subspaces of matrices: what represents them, how to find them, and their geometry."""

from .bases import (
    Coordinates,
    DCTColumns,
    Dense,
    Entries,
    OneSided,
    Seeded,
    Subspace,
    TwoSided,
    Whole,
)
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
    "DCTColumns",
    "Dense",
    "Entries",
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
