"""What represents a subspace, and how matrices go into it and come back.

With orthonormal columns Q of R^d (d = m on the left, n on the right of an (m, n) matrix x):

    left:   project(x) = Qᵀ x  (r, n)      lift(c) = Q c        residual(x) = x - lift(project(x))
    right:  project(x) = x Q   (m, r)      lift(c) = c Qᵀ

All tensors may carry leading batch dimensions, and those of a basis broadcast to those of x. Bases
stay in their own dtype; products are computed in float32, or in float64 if any operand is float64.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..linalg.dtypes import common_dtype, compute_dtype
from ..linalg.indexing import add_at_, add_entries_, take, take_entries
from ..linalg.products import add_product_, add_scaled_, product, store
from ..linalg.random import gaussian_basis, random_orthogonal
from ..linalg.shapes import Side, broadcast_batch, check_matrix, check_rank, check_side
from .fixed_columns import Slots
from .subspace import OneSided, Subspace

__all__ = [
    "Coordinates",
    "Dense",
    "Entries",
    "OneSided",
    "Seeded",
    "Subspace",
    "TwoSided",
    "Whole",
]

Distribution = Literal["gaussian", "gaussian_rows", "orthogonal"]


@dataclass(frozen=True, eq=False)
class Dense(OneSided):
    """A stored basis (..., d, r).

    With orthonormal=False the columns are any, and project and lift still multiply by them: with
    entries N(0, 1) / sqrt(r) they undo each other only on average ("Flora: Low-Rank Adapters Are
    Secretly Gradient Compressors", 2024, arXiv:2402.03293).

    Raises:
        ValueError: `side` is unknown or `basis` is not a matrix.
    """

    side: Side
    basis: Tensor
    orthonormal: bool = True

    def __post_init__(self) -> None:
        check_side(self.side)
        check_matrix("basis", self.basis)

    @property
    def size(self) -> int:
        return self.basis.shape[-2]

    @property
    def rank(self) -> int:
        return self.basis.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.basis.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.basis.to(dtype or self.dtype)


@dataclass(frozen=True, eq=False)
class Seeded(OneSided):
    """A random basis drawn again at every use, so that only a seed is stored.

    Attributes:
        seed: one integer for a (d, r) basis, or a tuple with one per matrix of the batch for a
            basis of shape (batch, d, r).
        dtype, device: of the columns; the draw itself is made on the CPU (see `linalg.gaussian`).
        distribution: "gaussian" or "gaussian_rows" for entries N(0, 1) / sqrt(r), not orthonormal,
            drawn as (d, r) or as the transpose of (r, d) (see `linalg.gaussian_basis` for which
            published code does what); "orthogonal" for orthonormal columns.
        lead: inner batch dimensions of a stacked parameter, whose matrices have a seed each: a
            tuple of seeds then gives a basis of shape (len(seed) / prod(lead), *lead, d, r).

    Raises:
        ValueError: `side`, `rank` or `distribution` is not allowed.
    """

    side: Side
    size: int
    rank: int
    seed: int | tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    distribution: Distribution = "gaussian"
    lead: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_side(self.side)
        if self.distribution not in get_args(Distribution):
            allowed = ", ".join(get_args(Distribution))
            raise ValueError(f"distribution must be one of {allowed}, got {self.distribution!r}")
        if self.orthonormal or self.rank < 1:
            check_rank(self.rank, self.size)

    @property
    def orthonormal(self) -> bool:
        return self.distribution == "orthogonal"

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        if not isinstance(self.seed, tuple):
            return self._draw(self.seed).to(dtype or self.dtype)
        drawn = torch.stack([self._draw(seed) for seed in self.seed]).to(dtype or self.dtype)
        return drawn.view(-1, *self.lead, self.size, self.rank)

    def materialise(self) -> Dense:
        """The same subspace with its columns drawn once, for several uses in a row."""
        return Dense(self.side, self.dense(), self.orthonormal)

    def _draw(self, seed: int) -> Tensor:
        if self.distribution == "orthogonal":
            return random_orthogonal(
                seed, self.size, self.rank, dtype=self.dtype, device=self.device
            )
        rows = self.distribution == "gaussian_rows"
        return gaussian_basis(
            seed, self.size, self.rank, rows=rows, dtype=self.dtype, device=self.device
        )


@dataclass(frozen=True, eq=False)
class Coordinates(OneSided):
    """Chosen rows (left) or columns (right) of x; `index` (..., r) holds distinct int64 places.

    Raises:
        TypeError: `index` is not int64.
        ValueError: `side` is unknown.
    """

    side: Side
    index: Tensor
    size: int

    def __post_init__(self) -> None:
        check_side(self.side)
        _check_index(self.index)

    @property
    def rank(self) -> int:
        return self.index.shape[-1]

    @property
    def _dim(self) -> int:
        return -2 if self.side == "left" else -1

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        index = self.index.unsqueeze(-2)
        shape = (*index.shape[:-2], self.size, self.rank)
        zeros = torch.zeros(shape, dtype=dtype or self.dtype, device=index.device)
        return zeros.scatter_(-2, index, 1.0)

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return store(take(x, self.index, self._dim).to(compute_dtype(x.dtype)), out)

    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            batch = broadcast_batch(c.shape[:-2], self.index.shape[:-1])
            other = c.shape[-1 if self.side == "left" else -2]
            shape = (self.size, other) if self.side == "left" else (other, self.size)
            out = torch.empty((*batch, *shape), dtype=compute_dtype(c.dtype), device=c.device)
        return self.add_lift_(out, c, beta=0.0)

    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        c = coordinates.to(common_dtype(coordinates, target))
        return add_at_(target, self.index, c, self._dim, alpha=alpha, beta=beta)

    def change_from(self, previous: Subspace) -> Tensor:
        old = self._in_same_space("change_from", previous)
        if isinstance(old, Coordinates):
            return _matches(self.index, old.index)
        return super().change_from(old)

    def slots_from(self, previous: Subspace) -> Slots | None:
        if isinstance(previous, Coordinates):
            return Slots.between(self.index, previous.index, self.size)
        return None


@dataclass(frozen=True, eq=False)
class TwoSided(Subspace):
    """A basis on each side: project(x) = Lᵀ x R, with L (..., m, r_l) and R (..., n, r_r).

    Raises:
        ValueError: `left` or `right` is not a matrix.
    """

    left: Tensor
    right: Tensor
    orthonormal: bool = True

    def __post_init__(self) -> None:
        check_matrix("left", self.left)
        check_matrix("right", self.right)

    def coordinate_shape(self, m: int, n: int) -> tuple[int, ...]:
        return (self.left.shape[-1], self.right.shape[-1])

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        x, left, right = self._operands(x)
        if self._left_is_smaller:
            return product(left.mT @ x, right, out)
        return product(left.mT, x @ right, out)

    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        return product(*self._factors(c), out)

    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        return add_product_(target, *self._factors(coordinates, target), alpha=alpha, beta=beta)

    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return self.left.to(dtype or self.left.dtype), self.right.to(dtype or self.right.dtype)

    def change_from(self, previous: Subspace) -> tuple[Tensor, Tensor]:
        if not isinstance(previous, TwoSided):
            raise self._undefined("change_from", previous)
        pairs = zip(self._sides(), previous._sides(), strict=True)
        left, right = (new.change_from(old) for new, old in pairs)
        return left, right

    def overlap(self, other: Subspace) -> Tensor:
        if not isinstance(other, TwoSided):
            raise self._undefined("overlap", other)
        pairs = zip(self._sides(), other._sides(), strict=True)
        left, right = (mine.overlap(theirs) for mine, theirs in pairs)
        return left * right

    @property
    def _left_is_smaller(self) -> bool:
        return self.left.shape[-1] <= self.right.shape[-1]

    def _sides(self) -> tuple[Dense, Dense]:
        left = Dense("left", self.left, self.orthonormal)
        return left, Dense("right", self.right, self.orthonormal)

    def _operands(self, first: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = common_dtype(self.left, self.right, first, *others)
        return first.to(dtype), self.left.to(dtype), self.right.to(dtype)

    def _factors(self, c: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """lift(c) as a product of two matrices, the thinner inner dimension between them."""
        c, left, right = self._operands(c, *others)
        return (left, c @ right.mT) if self._left_is_smaller else (left @ c, right.mT)


@dataclass(frozen=True, eq=False)
class Entries(Subspace):
    """Chosen entries of a matrix of `shape` (m, n); coordinates are a vector (..., k).

    `index` (..., k) holds distinct int64 places in row-major order.

    Raises:
        TypeError: `index` is not int64.
    """

    index: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        _check_index(self.index)

    def coordinate_shape(self, m: int, n: int) -> tuple[int, ...]:
        return (self.index.shape[-1],)

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return store(take_entries(x, self.index).to(compute_dtype(x.dtype)), out)

    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            batch = broadcast_batch(c.shape[:-1], self.index.shape[:-1])
            out = torch.empty((*batch, *self.shape), dtype=compute_dtype(c.dtype), device=c.device)
        return self.add_lift_(out, c, beta=0.0)

    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        c = coordinates.to(common_dtype(coordinates, target))
        return add_entries_(target, self.index, c, alpha=alpha, beta=beta)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        raise self._undefined("dense")

    def change_from(self, previous: Subspace) -> Tensor:
        raise self._undefined("change_from", previous)

    def overlap(self, other: Subspace) -> Tensor:
        if not isinstance(other, Entries):
            raise self._undefined("overlap", other)
        if self.shape != other.shape:
            raise ValueError(
                f"overlap needs two subspaces of one space, got {self.shape} and {other.shape}"
            )
        batch = broadcast_batch(self.index.shape[:-1], other.index.shape[:-1])
        mine, theirs = (s.index.expand(*batch, s.index.shape[-1]) for s in (self, other))
        chosen = torch.zeros(
            (*batch, self.shape[0] * self.shape[1]), dtype=torch.bool, device=mine.device
        )
        shared = chosen.scatter_(-1, mine, True).gather(-1, theirs).sum(-1)
        return shared / min(mine.shape[-1], theirs.shape[-1])


@dataclass(frozen=True, eq=False)
class Whole(Subspace):
    """All matrices: coordinates are the matrix itself (the same tensor when its dtype allows)."""

    def coordinate_shape(self, m: int, n: int) -> tuple[int, ...]:
        return (m, n)

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return store(x.to(compute_dtype(x.dtype)), out)

    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        return store(c.to(compute_dtype(c.dtype)), out)

    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        c = coordinates.to(common_dtype(coordinates, target))
        return add_scaled_(target, c, alpha=alpha, beta=beta)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        raise self._undefined("dense")

    def change_from(self, previous: Subspace) -> Tensor:
        raise self._undefined("change_from", previous)

    def overlap(self, other: Subspace) -> Tensor:
        if not isinstance(other, Whole):
            raise self._undefined("overlap", other)
        return torch.ones(())


def _check_index(index: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")


def _matches(new: Tensor, old: Tensor) -> Tensor:
    """Qᵀ_new Q_old for columns of one orthogonal matrix: exactly 1 where the indices agree."""
    return (new.unsqueeze(-1) == old.unsqueeze(-2)).to(torch.float32)
