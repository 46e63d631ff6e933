"""Chosen columns of one orthogonal matrix that all layers of a width share.

What changes from refresh to refresh is only which columns are in use. A change of basis is then no
product of matrices: coordinates move from slot to slot, or start from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..linalg.dct import dct_basis
from ..linalg.dtypes import compute_dtype
from ..linalg.indexing import take
from ..linalg.products import store
from ..linalg.random import random_orthogonal
from ..linalg.shapes import Side, check_side
from .subspace import OneSided, Subspace

FixedMatrix = Literal["dct2", "dct3", "random"]


@dataclass(frozen=True)
class Slots:
    """A change between two choices from the same columns: what C = Q_newᵀ Q_old is then.

    Attributes:
        source: (..., r) int64; the old slot whose coordinate each new slot takes over. None if that
            is its own everywhere.
        kept: (..., r) bool; whether there is one.
    """

    source: Tensor | None
    kept: Tensor

    @classmethod
    def between(cls, new: Tensor, old: Tensor, size: int) -> Slots:
        """The change from the columns `old` (..., r_old) to `new` (..., r_new) out of `size`."""
        slots = torch.arange(old.shape[-1], device=old.device).expand_as(old)
        places = old.new_full((*old.shape[:-1], size), -1).scatter_(-1, old, slots)
        source = places.gather(-1, new)
        return cls(source.clamp(min=0), source >= 0)

    def move(self, coordinates: Tensor, side: Side) -> Tensor:
        """C c on the left, c Cᵀ on the right: a copy by index, with exact zeros."""
        along, across = (-2, -1) if side == "left" else (-1, -2)
        moved = coordinates if self.source is None else take(coordinates, self.source, along)
        # A product takes a tenth of the time of masked_fill.
        return moved * self.kept.unsqueeze(across).to(moved.dtype)


@dataclass(frozen=True, eq=False)
class FixedColumns(OneSided):
    """Chosen columns of a shared orthogonal matrix.

    Attributes:
        side: which side of a matrix they compress.
        index: (..., r) int64, distinct: which columns.
        vectors: (d, d), the columns as rows, so that choosing some copies whole rows; never
            written to.
        seen: a matrix and its coordinates, if they are known already.
        aligned: the `index` of an earlier choice whose columns have kept their slots in this one.

    Raises:
        TypeError: `index` is not int64.
        ValueError: `side` is unknown.
    """

    side: Side
    index: Tensor
    vectors: Tensor
    seen: tuple[Tensor, Tensor] | None = None
    aligned: Tensor | None = None

    def __post_init__(self) -> None:
        check_side(self.side)
        if self.index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {self.index.dtype}")

    @property
    def size(self) -> int:
        return self.vectors.shape[-1]

    @property
    def rank(self) -> int:
        return self.index.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors.dtype

    @cached_property
    def _chosen(self) -> Tensor:
        """The basis vectors in use as rows, (..., r, d)."""
        rows = self.vectors.index_select(0, self.index.flatten())
        return rows.view(*self.index.shape, self.size)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._chosen.mT.to(dtype or self.dtype)

    def project(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        if self.seen is not None and x is self.seen[0]:
            return store(self.seen[1], out)
        return super().project(x, out=out)

    def change_from(self, previous: Subspace) -> Tensor:
        if isinstance(previous, FixedColumns) and previous.vectors is self.vectors:
            same = self.index.unsqueeze(-1) == previous.index.unsqueeze(-2)
            return same.to(compute_dtype(self.dtype))
        return super().change_from(previous)

    def slots_from(self, previous: Subspace) -> Slots | None:
        if not isinstance(previous, FixedColumns) or previous.vectors is not self.vectors:
            return None
        if self.aligned is previous.index:
            return Slots(None, self.index == previous.index)
        return Slots.between(self.index, previous.index, self.size)


def keep_slots(chosen: Tensor, previous: Tensor, size: int) -> Tensor:
    """`chosen` in an order in which what was in `previous` already keeps its slot.

    Newcomers take the vacated slots in ascending order, so coordinates of columns that stay never
    move.

    Args:
        chosen: (..., r) int64, distinct, of range(size).
        previous: (..., r), the same.
        size: see above.

    Returns:
        (..., r): the same set as `chosen`.
    """
    wanted = torch.zeros((*chosen.shape[:-1], size), dtype=torch.bool, device=chosen.device)
    stays = wanted.scatter_(-1, chosen, True).gather(-1, previous)
    newcomer = wanted.scatter_(-1, previous, False).gather(-1, chosen)
    # Newcomers first, in ascending order: the others count as larger than any index.
    order = torch.where(newcomer, chosen, size).sort(-1).values
    turn = (~stays).cumsum(-1).sub_(1).clamp_(min=0)
    return torch.where(stays, previous, order.gather(-1, turn))


@lru_cache(maxsize=16)
def shared_vectors(
    matrix: FixedMatrix, size: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The columns of an orthogonal matrix as rows, (size, size); one tensor for all who ask.

    "dct2" has the DCT-II basis vectors as its columns, "dct3" is its transpose (see `linalg.dct`),
    "random" is uniform over all orthogonal matrices. The last sixteen stay in memory.

    Args:
        matrix: see above.
        size: d.
        seed: of the random matrix.
        dtype: of the result.
        device: of the result.
    """
    if matrix == "random":
        drawn = random_orthogonal(seed, size, size, dtype=dtype, device=device)
        return drawn.mT.contiguous()
    return dct_basis(size, inverse=matrix == "dct2", dtype=dtype, device=device)
