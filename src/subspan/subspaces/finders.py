"""Finders: where a subspace comes from.

A finder is a small frozen object. It says which kind of basis it produces (`form`), from which the
state that holds the basis follows, and estimates a subspace from a gradient, the moments, a seed or
nothing. All finders work on batches `(..., m, n)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg.products import add_product_
from subspan.subspaces.bases import (
    Coordinates,
    Dense,
    Entries,
    OneSided,
    Seeded,
    Subspace,
    TwoSided,
)
from subspan.subspaces.finder import Finder, Form, OneSide, Sight, matrix_seeds
from subspan.subspaces.finders_coap import CoapNudge
from subspan.subspaces.finders_fixed import TopColumns
from subspan.subspaces.finders_grassmann import GrassmannTracking, GrassmannWalk
from subspan.subspaces.finders_online import OnlinePCA
from subspan.subspaces.finders_sampled import ImportanceSampledSVD
from subspan.subspaces.layout import Layout
from subspan.subspaces.tucker import Tucker

__all__ = [
    "FINDERS",
    "SVD",
    "Finder",
    "RandomCoordinates",
    "RandomOrthogonal",
    "RandomizedSVD",
    "Replay",
    "SeededGaussian",
    "Sight",
    "WarmPowerIteration",
    "resolve_finder",
]


def _non_negative(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} must be an integer of at least 0")


@dataclass(frozen=True)
class SVD(Finder):
    """The leading singular vectors of the gradient, exactly.

    GaLore, Zhao et al. 2024, arXiv 2403.03507.
    """

    def find(self, sight: Sight) -> Subspace:
        rank = sight.layout.rank
        if sight.layout.side == "both":
            bases = dict(
                zip(("left", "right"), linalg.top_bases(sight.gradient, rank), strict=True)
            )
            return self._each_side(sight, bases.__getitem__)
        return self._each_side(
            sight, lambda side: linalg.top_basis(sight.gradient, rank, side=side, method="svd")
        )


@dataclass(frozen=True)
class RandomizedSVD(Finder):
    """Leading singular vectors by warm-started randomised subspace iteration.

    Halko, Martinsson, Tropp: Finding structure with randomness, 2011, arXiv 0909.4061. The first
    refresh starts from a Gaussian sketch, later ones from the previous basis completed by
    `oversampling` fresh Gaussian columns, so that directions the old basis does not see can enter.

    Args:
        oversampling: extra sketch columns.
        power_iterations: rounds beyond the first for a cold start; a warm start takes one fewer.
    """

    oversampling: int = 8
    power_iterations: int = 1

    def __post_init__(self) -> None:
        _non_negative("oversampling", self.oversampling)
        _non_negative("power_iterations", self.power_iterations)

    def find(self, sight: Sight) -> Subspace:
        *_, m, n = sight.gradient.shape
        rank = sight.layout.rank

        def basis(side: OneSide) -> Tensor:
            d = m if side == "left" else n
            previous = _basis_of(sight.previous, side)
            extra = min(self.oversampling, min(m, n) - rank)
            columns = extra if previous is not None else rank + extra
            rounds = (
                self.power_iterations if previous is None else max(0, self.power_iterations - 1)
            )
            sketch = sight.draw(
                lambda seed: linalg.gaussian(seed, (d, columns), sight.gradient.dtype)
            )
            if previous is not None:
                # Unit-norm columns, so that the fresh directions weigh as much as the old ones.
                sketch = torch.cat([previous.to(sketch.dtype), sketch / d**0.5], dim=-1)
            return linalg.sketched_basis(
                sight.gradient, rank, side=side, sketch=sketch, power_iterations=rounds
            )

        return self._each_side(sight, basis)


@dataclass(frozen=True)
class WarmPowerIteration(Finder):
    """One step of block power iteration from the previous basis, followed by QR (LDAdam).

    Robert et al.: LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics, 2024,
    arXiv 2410.16103. The matrix that is iterated on blends the lifted first moment with the
    gradient: `b = blend * momentum + (1 - blend) * gradient`; left: `Q = orth(b (b^T Q_old))`. The
    first basis is exact.

    Args:
        blend: weight of the momentum, in [0, 1).
        exact: take the leading singular vectors of `b` instead of iterating.
    """

    blend: float = 0.908
    exact: bool = False
    reads_momentum = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.blend < 1.0:
            raise ValueError(f"blend={self.blend!r} must lie in [0, 1)")

    def find(self, sight: Sight) -> Subspace:
        def basis(side: OneSide) -> Tensor:
            previous = _basis_of(sight.previous, side)
            if previous is None or self.exact:
                return linalg.top_basis(self._blended(sight), sight.layout.rank, side=side)
            previous = previous.to(sight.gradient.dtype)
            turned = self._product(sight, previous, transposed=side == "left")
            return linalg.orthonormalise(self._product(sight, turned, transposed=side == "right"))

        if sight.layout.side == "both":
            return TwoSided(basis("left"), basis("right"))
        return Dense(sight.layout.one_side, basis(sight.layout.one_side))

    def _product(self, sight: Sight, x: Tensor, *, transposed: bool) -> Tensor:
        """`b x` or `b^T x` without forming b.

        The lifted momentum is a product of two thin factors. Where `x` is the basis that lifts it,
        one of them and `x` cancel.
        """
        matrix = sight.gradient.mT if transposed else sight.gradient
        if sight.momentum is None:
            return matrix @ x
        left, right = _thin_factors(sight.previous, sight.momentum)
        left, right = (right, left) if transposed else (left, right)
        result = sight.scratch(left).copy_(left) if x is right else left @ (right.mT @ x)
        return add_product_(result, matrix, x, alpha=1.0 - self.blend, beta=self.blend)

    def _blended(self, sight: Sight) -> Tensor:
        if sight.momentum is None or sight.previous is None:
            return sight.gradient
        blended = sight.gradient * (1.0 - self.blend)
        return sight.previous.add_lift_(blended, sight.momentum, alpha=self.blend)


@dataclass(frozen=True)
class RandomOrthogonal(Finder):
    """A fresh random orthonormal basis at every refresh.

    Args:
        stored: keep the basis between refreshes; otherwise it is drawn again at every step.
    """

    stored: bool = True
    reads_gradient = False

    @property
    def form(self) -> Form:  # type: ignore[override]
        """ "dense" if the basis is stored, else "seeded"."""
        return "dense" if self.stored else "seeded"

    @property
    def draws_from_seed(self) -> bool:  # type: ignore[override]
        """The seed of the basis in force is what is stored, if it is not."""
        return not self.stored

    def seeded(self) -> Finder:
        """See `Finder.seeded`."""
        return replace(self, stored=False)

    def find(self, sight: Sight) -> Subspace:
        if not self.stored:
            sight.state["seed"] = list(sight.seeds)
        layout, like = sight.layout, sight.gradient
        return self._seeded(sight.seeds, layout, like.dtype, like.device)

    def _seeded(
        self, seeds: Sequence[int], layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        def sample(size: int) -> Tensor:
            drawn = [
                linalg.random_orthogonal(seed, size, layout.rank, dtype=dtype, device=device)
                for seed in matrix_seeds(seeds, layout)
            ]
            lead = layout.view[:-2]
            if len(seeds) == 1:
                return drawn[0] if not lead else torch.stack(drawn).view(*lead, size, layout.rank)
            return torch.stack(drawn).view(len(seeds), *lead, size, layout.rank)

        if layout.side == "both":
            m, n = layout.matrix
            return TwoSided(sample(m), sample(n))
        return Dense(layout.one_side, sample(layout.side_size))


@dataclass(frozen=True)
class RandomCoordinates(Finder):
    """Randomly chosen rows (left), columns (right) or entries, without replacement (FRUGAL)."""

    form = "coordinates"
    reads_gradient = False
    supports_both_sides = False

    def find(self, sight: Sight) -> Subspace:
        layout = sight.layout
        entries = layout.side == "entries"
        size = math.prod(layout.matrix) if entries else layout.side_size
        index = sight.draw(lambda seed: linalg.random_coordinates(seed, size, layout.rank))
        if entries:
            return Entries(index, layout.matrix)
        return Coordinates(layout.one_side, index, size)


@dataclass(frozen=True)
class SeededGaussian(Finder):
    """A Gaussian matrix with entries N(0, 1/r), drawn from a seed.

    Flora (Hao, Cao, Mou 2024, arXiv 2402.03293) and APOLLO (Zhu et al. 2024, arXiv 2412.05270). The
    first basis uses the parameter's own seed, every refresh advances it by `linalg.next_seed`.
    Numbers are always drawn on the CPU, so a checkpoint means the same on every device.

    Args:
        split: draw from one of two seeds derived from the parameter's seed, one per side, as Flora
            does.
        stored: keep the basis between refreshes, as APOLLO's released code does. Otherwise it is
            drawn again at every step, which takes time instead of memory.
    """

    split: bool = False
    stored: bool = False
    orthonormal = False
    draws_from_seed = True
    reads_gradient = False
    supports_both_sides = False

    @property
    def form(self) -> Form:  # type: ignore[override]
        """ "dense" if the basis is stored, else "seeded"."""
        return "dense" if self.stored else "seeded"

    def seeded(self) -> Finder:
        """See `Finder.seeded`."""
        return replace(self, stored=False)

    def find(self, sight: Sight) -> Subspace:
        seeds = list(sight.state["seed"])
        if sight.previous is not None:
            seeds = [linalg.next_seed(seed) for seed in seeds]
        sight.state["seed"] = seeds
        return self._seeded(seeds, sight.layout, sight.gradient.dtype, sight.gradient.device)

    def _seeded(
        self, seeds: Sequence[int], layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        side = layout.one_side
        if self.split:
            seeds = [linalg.split_seed(seed)[0 if side == "left" else 1] for seed in seeds]
        # As in the published draws, Flora's left and APOLLO's right basis are drawn transposed.
        rows = (side == "left") == self.split
        drawn = matrix_seeds(seeds, layout)
        lead = layout.view[:-2]
        single = len(drawn) == 1 and not lead
        basis = Seeded(
            side,
            layout.side_size,
            layout.rank,
            drawn[0] if single else drawn,
            dtype,
            device,
            "gaussian_rows" if rows else "gaussian",
            lead=lead,
        ).dense()
        if lead and len(seeds) == 1:
            basis = basis[0]
        return Dense(side, basis, orthonormal=False)


@dataclass(frozen=True)
class Replay(Finder):
    """Hands out given bases by parameter and step.

    With it any recipe can be checked against a recording.

    Args:
        bases: `{parameter name or position: {step: basis}}`. A basis is a `(d, r)` matrix or its
            transpose, a pair of them for both sides, a sequence of factors for the leading modes,
            an index vector for chosen coordinates, or a
            pair (rows, columns) of index vectors for chosen entries. The latest recorded step not
            after the current one counts.
        like: the finder whose form of basis is replayed; recipes fill in their own.

    Raises:
        KeyError: at a refresh, if nothing is recorded for the parameter up to that step.
    """

    bases: Mapping[str | int, Mapping[int, Any]] = field(repr=False)
    like: Finder | None = None
    reads_gradient = False

    @property
    def form(self) -> Form:  # type: ignore[override]
        """The replayed finder's form; a seeded basis has to be stored to be replayed."""
        form = "dense" if self.like is None else self.like.form
        return "dense" if form == "seeded" else form  # type: ignore[return-value]

    @property
    def orthonormal(self) -> bool:  # type: ignore[override]
        """Whether the replayed finder's bases are."""
        return self.like is None or self.like.orthonormal

    def find(self, sight: Sight) -> Subspace:
        recorded = [self._recorded(layout, sight.step) for layout in sight.layouts]
        layout, stacked = sight.layout, sight.stacked
        m, n = layout.matrix

        def columns(values: list[Any], d: int) -> Tensor:
            turned = [value if value.shape[-2] == d else value.mT for value in values]
            return stacked([value.to(sight.gradient.dtype).contiguous() for value in turned])

        if layout.side == "entries":
            return Entries(stacked([row.long() * n + col.long() for row, col in recorded]), (m, n))
        if layout.side == "modes":
            count = len(layout.view) - len(recorded[0])
            modes = zip(*recorded, strict=True)
            factors = (stacked([f.to(sight.gradient.dtype) for f in mode]) for mode in modes)
            return Tucker((*factors, *[None] * count), self.orthonormal)
        if layout.side == "both":
            left, right = zip(*recorded, strict=True)
            return TwoSided(columns(list(left), m), columns(list(right), n))
        side, size = layout.one_side, layout.side_size
        if self.form in ("coordinates", "columns"):
            index, like = stacked([value.long() for value in recorded]), sight.gradient
            return self.indexed(index, layout, like.dtype, like.device)
        return Dense(side, columns(recorded, size), self.orthonormal)

    def indexed(
        self, index: Tensor, layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        if self.like is None:
            return super().indexed(index, layout, dtype, device)
        return self.like.indexed(index, layout, dtype, device)

    def _recorded(self, layout: Layout, step: int) -> Any:
        key = layout.name if layout.name in self.bases else layout.index
        steps = [at for at in self.bases.get(key, {}) if at <= step]
        if not steps:
            raise KeyError(f"Replay holds no basis for parameter {layout.name!r} at step {step}")
        return self.bases[key][max(steps)]


FINDERS: dict[str, Finder] = {
    "svd": SVD(),
    "randomized": RandomizedSVD(),
    "power": WarmPowerIteration(),
    "orthogonal": RandomOrthogonal(),
    "coordinates": RandomCoordinates(),
    "gaussian": SeededGaussian(),
    "subtrack": GrassmannTracking(),
    "grasswalk": GrassmannWalk(),
    "sara": ImportanceSampledSVD(),
    "coap": CoapNudge(),
    "dct": TopColumns(),
    "online": OnlinePCA(),
}


def resolve_finder(finder: str | Finder, default: Finder) -> Finder:
    """The finder that a recipe's `finder=` names or is.

    A `Replay` takes the form of the recipe's default.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if it is neither a name nor a finder.
    """
    if isinstance(finder, Replay) and finder.like is None:
        return Replay(finder.bases, like=default)
    if isinstance(finder, Finder):
        return finder
    if not isinstance(finder, str):
        raise TypeError(f"finder={finder!r} must be a name ({', '.join(FINDERS)}) or a Finder")
    if finder not in FINDERS:
        raise ValueError(
            f"finder={finder!r} is not known: use one of {', '.join(FINDERS)}, or a Finder"
        )
    named = FINDERS[finder]
    return default if type(named) is type(default) else named


def _thin_factors(subspace: Subspace | None, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """`lift(coordinates) = left @ right^T` with thin factors."""
    if isinstance(subspace, TwoSided):
        return subspace.left.to(coordinates.dtype) @ coordinates, subspace.right.to(
            coordinates.dtype
        )
    if not isinstance(subspace, OneSided):
        raise TypeError(f"the lift of {type(subspace).__name__} has no thin factors")
    basis = subspace.dense(coordinates.dtype)
    return (basis, coordinates.mT) if subspace.side == "left" else (coordinates, basis)


def _basis_of(subspace: Subspace | None, side: str) -> Tensor | None:
    if isinstance(subspace, TwoSided):
        return subspace.left if side == "left" else subspace.right
    return subspace.basis if isinstance(subspace, Dense) else None
