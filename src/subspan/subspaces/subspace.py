"""What a subspace of matrices is: project, lift, residual, overlap."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg.dtypes import common_dtype, compute_dtype
from ..linalg.orthonormal import orthonormalise
from ..linalg.products import add_product_, product
from ..linalg.shapes import Side

if TYPE_CHECKING:
    from .fixed_columns import Slots


class Subspace(ABC):
    """A subspace of the (m, n) matrices, with a basis in which its members have coordinates."""

    @property
    def orthonormal(self) -> bool:
        """Whether `project` is the orthogonal projection, so that project(lift(c)) = c."""
        return True

    @abstractmethod
    def coordinate_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of the coordinates of one (m, n) matrix, without batch dimensions."""

    @abstractmethod
    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The coordinates of `x` (..., m, n), written to `out` when given."""

    @abstractmethod
    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The (..., m, n) matrix with coordinates `c`, written to `out` when given."""

    @abstractmethod
    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        """target <- beta * target + alpha * lift(coordinates), in place; returns `target`.

        Makes no full-size temporary when `target` has the dtype of the computation; a target of
        lower precision is rounded once. beta = 0 ignores what `target` held.
        """

    def residual(self, x: Tensor, coordinates: Tensor | None = None) -> Tensor:
        """x - lift(project(x)); pass `coordinates` = project(x) if they are known already."""
        coordinates = self.project(x) if coordinates is None else coordinates
        return self.add_lift_(x.to(coordinates.dtype, copy=True), coordinates, alpha=-1.0)

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The basis columns (..., d, r), or the (left, right) pair of them.

        Raises:
            TypeError: the kind has no columns.
        """

    @abstractmethod
    def change_from(self, previous: "Subspace") -> Tensor | tuple[Tensor, Tensor]:
        """C = Q_newᵀ Q_old (..., r_new, r_old), or the (left, right) pair of them.

        Old coordinates c become C c on the left, c Cᵀ on the right, C_l c C_rᵀ on both sides.

        Raises:
            TypeError: not defined between these kinds.
            ValueError: the two lie in different spaces.
        """

    def slots_from(self, previous: "Subspace") -> "Slots | None":
        """`change_from` as a copy by index, for two choices from the same columns; else None."""
        return None

    @abstractmethod
    def overlap(self, other: "Subspace") -> Tensor:
        """||Q1ᵀ Q2||_F² / min(r1, r2) in [0, 1] for orthonormal bases of the two: shape (...).

        1 when one contains the other, 0 when they are orthogonal, about r / d for random ones.

        Raises:
            TypeError: not defined between these kinds.
            ValueError: the two lie in different spaces.
        """

    def _undefined(self, what: str, other: object = None) -> TypeError:
        between = "" if other is None else f" and {type(other).__name__}"
        return TypeError(f"{what} is not defined for {type(self).__name__}{between}")


class OneSided(Subspace):
    """A subspace of R^d on one side; a kind is its `side`, `size`, `rank` and `dense`."""

    side: Side

    # Real properties here would become default values of the fields with these names.
    if TYPE_CHECKING:

        @property
        def size(self) -> int:
            """The dimension d of the surrounding space."""

        @property
        def rank(self) -> int:
            """The number of basis columns r."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the columns are held."""
        return torch.float32

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The basis columns (..., d, r), in the dtype they are held in or the given one."""

    def coordinate_shape(self, m: int, n: int) -> tuple[int, ...]:
        return (self.rank, n) if self.side == "left" else (m, self.rank)

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        x, basis = self._operands(x)
        return product(basis.mT, x, out) if self.side == "left" else product(x, basis, out)

    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        c, basis = self._operands(c)
        return product(basis, c, out) if self.side == "left" else product(c, basis.mT, out)

    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        c, basis = self._operands(coordinates, target)
        a, b = (basis, c) if self.side == "left" else (c, basis.mT)
        return add_product_(target, a, b, alpha=alpha, beta=beta)

    def change_from(self, previous: Subspace) -> Tensor:
        old = self._in_same_space("change_from", previous)
        dtype = torch.promote_types(compute_dtype(self.dtype), compute_dtype(old.dtype))
        return self.dense(dtype).mT @ old.dense(dtype)

    def overlap(self, other: Subspace) -> Tensor:
        other = self._in_same_space("overlap", other)
        if self.orthonormal and other.orthonormal:
            return _mean_square(self.change_from(other))
        dtype = torch.promote_types(compute_dtype(self.dtype), compute_dtype(other.dtype))
        mine, theirs = (
            s.dense(dtype) if s.orthonormal else orthonormalise(s.dense(dtype))
            for s in (self, other)
        )
        return _mean_square(mine.mT @ theirs)

    def _operands(self, first: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """`first` and the basis columns, both in the dtype of the computation."""
        dtype = torch.promote_types(common_dtype(first, *others), compute_dtype(self.dtype))
        return first.to(dtype), self.dense(dtype)

    def _in_same_space(self, what: str, other: Subspace) -> "OneSided":
        if not isinstance(other, OneSided):
            raise self._undefined(what, other)
        if (self.side, self.size) != (other.side, other.size):
            raise ValueError(
                f"{what} needs two subspaces of one space, got {self.side} of size {self.size} "
                f"and {other.side} of size {other.size}"
            )
        return other


def _mean_square(change: Tensor) -> Tensor:
    """||C||_F² over the smaller of its two ranks, with rounding above 1 cut off."""
    return (change.square().sum((-2, -1)) / min(change.shape[-2:])).clamp(max=1.0)
