"""How a parameter is seen: as which matrix, projected on which side, with which rank.

A `Layout` is decided once, when the optimizer is built, and never guessed again from the shape of
some tensor. A part *declares* the state it needs as `StateDeclaration`s whose shapes are named
rules of the layout; allocation, storage, checkpoints and the memory plan all follow from these
declarations.

Matrices are `(..., m, n)` with m rows and n columns. A weight with more than two dimensions is read
as the matrix `(d0, d1 * d2 * ...)` (a convolution kernel: one row per output channel), or, when it
is `stacked`, as a batch of matrices over its leading dimensions (the experts of a mixture).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Side = Literal["left", "right", "both", "entries", "modes"]
Kind = Literal["first_moment", "second_moment", "basis", "error", "scalar"]

PROJECTION_TYPES = ("std", "reverse_std", "left", "right", "full", "entries", "tucker")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateDeclaration:
    """One tensor (or number) that a part keeps for every parameter.

    Args:
        name: key in `optimizer.state[parameter]`.
        kind: what it is; chooses the storage format.
        shape: rule of `Layout.shape`, or the shape itself.
        fill: initial value; "parameter" copies the weight (only for the coordinates of unprojected
            tensors).
        dtype: "storage" (the format chosen for its kind), "compute" (float32, or float64 for
            float64 parameters: what few bits would spoil) or a fixed torch dtype.
    """

    name: str
    kind: Kind
    shape: str | Shape = "coordinates"
    fill: float | Literal["parameter"] = 0.0
    dtype: torch.dtype | Literal["storage", "compute"] = "storage"


@dataclass(frozen=True)
class Layout:
    """The matrix view of one parameter and the subspace it is projected on.

    Args:
        index: position among all parameters of the optimizer, 0-based (seeds derive from it).
        name: the parameter's name, or its position as text when parameters are unnamed.
        natural: shape of the parameter itself.
        view: shape in which the engine computes: `(..., m, n)` for matrices, else `natural`.
        side: side of the projection; None when the parameter is not projected.
        rank: dimension of the subspace on each projected side (for "entries": number of entries); 0
            if None.
        projected: whether the recipe's subspace or activity applies to the parameter.
        mode_ranks: rank of every mode of a higher-order weight (side "modes"); None leaves a mode
            whole.
        complement: the coordinates are what lies outside the subspace, in full size.
        whole: shape of the parameter of which this is one rank's piece; None if it is all of it.
    """

    index: int
    name: str
    natural: tuple[int, ...]
    view: tuple[int, ...]
    side: Side | None = None
    rank: int = 0
    projected: bool = False
    mode_ranks: tuple[int | None, ...] = ()
    complement: bool = False
    whole: tuple[int, ...] | None = None

    @property
    def natural_size(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.natural)

    @property
    def is_matrix(self) -> bool:
        """Whether the engine computes on `(..., m, n)` matrices."""
        return len(self.view) >= 2

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        return self.view[-2], self.view[-1]

    @property
    def one_side(self) -> Literal["left", "right"]:
        """The side, for finders that only see one.

        Raises:
            TypeError: if the layout has two sides, entries, or no projection.
        """
        if self.side == "left" or self.side == "right":
            return self.side
        raise TypeError(f"parameter {self.name!r} is projected on {self.side}, not on one side")

    @property
    def side_size(self) -> int:
        """Dimension of the space on the one projected side."""
        return self.matrix[0 if self.one_side == "left" else 1]

    @property
    def coordinates(self) -> tuple[int, ...]:
        """Shape of what the inner optimizer sees."""
        if self.side is None or self.complement:
            return self.view
        if self.side == "modes":
            pairs = zip(self.view, self.mode_ranks, strict=True)
            return tuple(size if rank is None else rank for size, rank in pairs)
        *lead, m, n = self.view
        r = self.rank
        return {
            "left": (*lead, r, n),
            "right": (*lead, m, r),
            "both": (*lead, r, r),
            "entries": (*lead, r),
        }[self.side]

    def shape(self, rule: str | Shape) -> Shape:
        """The shape that a declaration's rule gives for this parameter."""
        if not isinstance(rule, str):
            return rule
        coordinates = self.coordinates
        if rule == "coordinates":
            return coordinates
        if rule == "coordinate_rows":
            return coordinates[:-1]
        if rule == "coordinate_columns":
            return (*coordinates[:-2], coordinates[-1])
        if rule == "matrix":
            return self.view
        if rule == "matrix_rows":
            return self.view[:-1]
        if rule == "matrix_columns":
            return (*self.view[:-2], self.view[-1])
        lead = self.view[:-2]
        if rule == "scalar":
            return () if self.side == "modes" else lead
        if rule == "index":
            return (*lead, self.rank)
        if rule == "basis":
            return (*lead, self.view[-1] if self.side == "right" else self.view[-2], self.rank)
        if rule == "basis_left":
            return (*lead, self.view[-2], self.rank)
        if rule == "basis_right":
            return (*lead, self.view[-1], self.rank)
        raise ValueError(f"shape rule {rule!r} is not known")


def check_rank(rank: object) -> None:
    """Refuse a rank that is neither a positive integer nor a fraction in (0, 1].

    Raises:
        ValueError: naming the value and what is allowed.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    fraction = isinstance(rank, float) and 0.0 < rank <= 1.0
    if not (whole or fraction):
        raise ValueError(
            f"rank={rank!r} is not possible: give a positive integer, a fraction of the smaller "
            "dimension in (0, 1], an EnergyRank, or None for a group that is not projected"
        )


def matrix_view(shape: tuple[int, ...], *, stacked: bool = False) -> tuple[int, ...]:
    """The `(..., m, n)` shape in which a weight of this shape is treated as one or more matrices.

    Fewer than two dimensions are left as they are. `(d0, d1, ..., dk)` becomes `(d0, d1*...*dk)`,
    or stays as it is, a batch over the leading dimensions, when `stacked`.
    """
    if len(shape) <= 2 or stacked:
        return shape
    return (shape[0], math.prod(shape[1:]))


def projection_side(m: int, n: int, proj_type: str, tie: Literal["left", "right"]) -> Side:
    """Which side of an m x n matrix a projection type compresses.

    "std" compresses the smaller dimension (rows >= columns: right, with `tie` deciding for
    squares), "reverse_std" the larger one, "full" both.

    Raises:
        ValueError: if `proj_type` is unknown.
    """
    if proj_type not in PROJECTION_TYPES:
        raise ValueError(
            f"proj_type={proj_type!r} is not known: use one of {', '.join(PROJECTION_TYPES)}"
        )
    if proj_type in ("left", "right", "entries"):
        return proj_type  # type: ignore[return-value]
    if proj_type == "full":
        return "both"
    if proj_type == "tucker":
        return "modes"
    short: Side = tie if m == n else ("right" if m > n else "left")
    if proj_type == "std":
        return short
    return "left" if short == "right" else "right"


def resolve_rank(m: int, n: int, side: Side, rank: int | float, *, coordinates: bool) -> int:
    """The number of basis columns (or entries) for an m x n matrix.

    An integer above the smaller dimension means full rank. A fraction is of the smaller dimension,
    rounded half to even; for chosen coordinates it is of the side's own dimension (all entries for
    "entries"), rounded down, as in the FRUGAL code. At least 1.
    """
    whole = {"left": m, "right": n, "both": min(m, n), "entries": m * n}[side]
    limit = whole if coordinates else min(m, n)
    if isinstance(rank, float):
        rank = math.floor(limit * rank) if coordinates else round(limit * rank)
    return max(1, min(rank, limit))


def mode_ranks(
    shape: tuple[int, ...], rank: int | float, modes: int | None
) -> tuple[int | None, ...]:
    """The rank of every mode of a higher-order weight.

    Args:
        shape: of the weight.
        rank: an integer for every mode, cut to its dimension, or a fraction of each dimension,
            rounded down, at least 1.
        modes: how many leading modes have a rank; None for all.

    Returns:
        One rank per mode; None leaves a mode whole.
    """
    count = len(shape) if modes is None else min(modes, len(shape))
    ranks = [
        max(1, math.floor(size * rank)) if isinstance(rank, float) else min(rank, size)
        for size in shape[:count]
    ]
    return (*ranks, *[None] * (len(shape) - count))
