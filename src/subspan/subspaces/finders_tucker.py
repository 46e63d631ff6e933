"""Finders of Tucker subspaces: one basis per mode of a higher-order weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subspan import linalg
from subspan.linalg.tucker import tucker_factors
from subspan.subspaces.bases import Subspace
from subspan.subspaces.finder import Finder, Form, Sight
from subspan.subspaces.geometry import align_signs
from subspan.subspaces.tucker import Factors, Tucker


@dataclass(frozen=True)
class HOOI(Finder):
    """Leading factors of the gradient by higher-order orthogonal iteration (tensor GaLore).

    The previous factors are where the iteration starts. De Lathauwer, De Moor, Vandewalle: On the
    best rank-1 and rank-(R1, R2, ..., RN) approximation of higher-order tensors, 2000.

    Args:
        sweeps: over all modes at the first refresh.
        warm_sweeps: at later ones; 0 starts cold with `sweeps`, as COAP recomputes.
    """

    sweeps: int = 3
    warm_sweeps: int = 1

    form: Form = "modes"
    supports_both_sides = False

    def __post_init__(self) -> None:
        if self.sweeps < 0 or self.warm_sweeps < 0:
            raise ValueError(
                f"sweeps={self.sweeps!r} and warm_sweeps={self.warm_sweeps!r} must be at least 0"
            )

    def find(self, sight: Sight) -> Subspace:
        ranks = sight.layout.mode_ranks
        previous = sight.previous.factors if isinstance(sight.previous, Tucker) else None
        warm = previous is not None and self.warm_sweeps > 0
        found = tucker_factors(
            sight.gradient,
            ranks,
            iterations=self.warm_sweeps if warm else self.sweeps,
            initial=previous if warm else None,
        )
        return Tucker(found if previous is None else aligned(found, previous))


@dataclass(frozen=True)
class RandomFactors(Finder):
    """Fresh random orthonormal factors at every refresh."""

    form: Form = "modes"
    reads_gradient = False
    supports_both_sides = False

    def find(self, sight: Sight) -> Subspace:
        layout, dtype = sight.layout, sight.gradient.dtype
        factors: list[Tensor | None] = []
        for mode, (size, rank) in enumerate(zip(layout.view, layout.mode_ranks, strict=True)):
            if rank is None:
                factors.append(None)
                continue
            drawn = [
                linalg.random_orthogonal(linalg.derive_seed(seed, mode), size, rank, dtype=dtype)
                for seed in sight.seeds
            ]
            factors.append(sight.stacked(drawn))
        return Tucker(tuple(factors))


def aligned(found: Factors, previous: Factors) -> Factors:
    """Factors whose columns have the signs of the previous ones."""
    pairs = zip(found, previous, strict=True)
    return tuple(a if a is None or b is None else align_signs(a, b) for a, b in pairs)
