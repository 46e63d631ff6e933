"""Subspaces of tensors with a basis on each mode: convolution kernels, weights of higher order.

With a factor F_i (d_i, r_i) on some modes of x (..., d_0, ..., d_{k-1}) and the others untouched:

    project(x) = x ×_0 F_0ᵀ ×_1 F_1ᵀ ...           lift(c) = c ×_0 F_0 ×_1 F_1 ...

`linalg.tucker` defines the product ×_i and finds factors. All modes have one in "Tensor-GaLore:
Memory-Efficient Training via Gradient Tensor Decomposition" (2025, arXiv:2501.02379); the output
and input channels of a convolution kernel in "COAP: Memory-Efficient Training with
Correlation-Aware Gradient Projection" (2024, arXiv:2412.00071).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.dtypes import common_dtype
from ..linalg.products import store
from ..linalg.shapes import check_matrix
from ..linalg.tucker import add_multi_mode_product_, multi_mode_product
from .bases import Dense
from .subspace import Subspace

Factors = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Tucker(Subspace):
    """A basis (..., d_i, r_i) on each of the last k modes of a tensor; None leaves a mode as it is.

    Leading dimensions of factors broadcast with those of x. With orthonormal=False the columns are
    any, and project and lift still multiply by them. Of a matrix, two factors make a `TwoSided`.

    Raises:
        ValueError: a factor is not a matrix, or there is none.
    """

    factors: Factors
    orthonormal: bool = True

    def __post_init__(self) -> None:
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                check_matrix(f"factors[{mode}]", factor)
        if not _held(self.factors):
            raise ValueError(f"factors must hold at least one matrix, got {self.factors}")

    def coordinate_shape(self, *dims: int) -> tuple[int, ...]:
        """Shape of the coordinates of one tensor (d_0, ..., d_{k-1}), without batch dimensions.

        Raises:
            ValueError: there are more or fewer sizes than modes.
        """
        if len(dims) != len(self.factors):
            raise ValueError(f"dims must be the sizes of {len(self.factors)} modes, got {dims}")
        pairs = zip(dims, self.factors, strict=True)
        return tuple(d if factor is None else factor.shape[-1] for d, factor in pairs)

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        x, factors = self._operands(x)
        return store(multi_mode_product(x, factors, transposed=True), out)

    def lift(self, c: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is not None:
            return self.add_lift_(out, c, beta=0.0)
        return multi_mode_product(*self._operands(c))

    def add_lift_(
        self, target: Tensor, coordinates: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        """As `Subspace.add_lift_`; a target that is not contiguous costs a full-size temporary."""
        c, factors = self._operands(coordinates, target)
        return add_multi_mode_product_(target, c, factors, alpha=alpha, beta=beta)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Not defined: the columns would be Kronecker products of those of `factors`.

        Raises:
            TypeError: always.
        """
        raise self._undefined("dense")

    def change_from(self, previous: Subspace) -> Factors:  # type: ignore[override]
        """C_i = F_newᵀ F_old of each mode, None where it has no factor.

        Old coordinates c become `turn(c, change)`.

        Raises:
            TypeError: `previous` is of another kind.
            ValueError: the two lie in different spaces, or have factors on different modes.
        """
        pairs = self._pairs("change_from", previous)
        return tuple(pair and pair[0].change_from(pair[1]) for pair in pairs)

    def overlap(self, other: Subspace) -> Tensor:
        """The product of the overlaps on all modes; raises as `change_from`."""
        pairs = self._pairs("overlap", other)
        overlaps = [pair[0].overlap(pair[1]) for pair in pairs if pair]
        return torch.stack(torch.broadcast_tensors(*overlaps)).prod(0)

    def _operands(self, first: Tensor, *others: Tensor) -> tuple[Tensor, Factors]:
        dtype = common_dtype(first, *others, *_held(self.factors))
        return first.to(dtype), tuple(
            None if factor is None else factor.to(dtype) for factor in self.factors
        )

    def _pairs(self, what: str, other: Subspace) -> list[tuple[Dense, Dense] | None]:
        """The factors of both on each mode, as one-sided subspaces."""
        if not isinstance(other, Tucker):
            raise self._undefined(what, other)
        mine, theirs = ([factor is not None for factor in s.factors] for s in (self, other))
        if mine != theirs:
            raise ValueError(f"{what} needs factors on the same modes, got {mine} and {theirs}")
        return [
            None
            if a is None or b is None
            else (Dense("left", a, self.orthonormal), Dense("left", b, other.orthonormal))
            for a, b in zip(self.factors, other.factors, strict=True)
        ]


def turn(core: Tensor, change: Sequence[Tensor | None], *, squared: bool = False) -> Tensor:
    """Coordinates in an old Tucker basis expressed in a new one: core ×_0 C_0 ×_1 C_1 ...

    Args:
        core: (..., r_0, ..., r_{k-1}), the old ranks.
        change: what `Tucker.change_from` returned.
        squared: multiply by C_i∘C_i instead, which turns variances (second moments), coordinates
            taken as uncorrelated.

    Returns:
        (..., r_0, ..., r_{k-1}), the new ranks, in the dtype of the computation.
    """
    dtype = common_dtype(core, *_held(change))
    matrices = [None if c is None else c.to(dtype) for c in change]
    if squared:
        matrices = [None if c is None else c.square() for c in matrices]
    return multi_mode_product(core.to(dtype), matrices)


def _held(matrices: Sequence[Tensor | None]) -> list[Tensor]:
    return [matrix for matrix in matrices if matrix is not None]
