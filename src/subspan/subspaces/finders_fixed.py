"""Columns of a fixed orthogonal matrix, chosen by how much of the gradient they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg.dct import shuffled_inverse, shuffled_places
from subspan.linalg.indexing import take
from subspan.subspaces.bases import Coordinates, Entries, Subspace
from subspan.subspaces.finder import Finder, Form, OneSide, Sight
from subspan.subspaces.fixed_columns import (
    FixedColumns,
    FixedMatrix,
    keep_slots,
    shared_vectors,
)
from subspan.subspaces.layout import Layout

Matrix = Literal["dct2", "dct3", "random", "identity"]
# Up to this width a matrix product is faster than an FFT on the CPU.
_SMALL_WIDTH = 192
# Entries that are transformed at once: cache-sized on the CPU, few kernels elsewhere.
_BLOCK = {"cpu": 1 << 18, "other": 1 << 23}


@dataclass(frozen=True)
class TopColumns(Finder):
    """The r columns of a fixed orthogonal matrix Q on which the gradient has the largest norm.

        right: S = G Q, weight of column j = ||S_j||_p      (left: S = Qᵀ G and its rows)

    A parameter only keeps r indices; Q is shared by all of its width. Columns that stay chosen keep
    their slots. Modoranu et al.: SVD-Free Low-Rank Adaptive Gradient Optimization, 2025, arXiv
    2505.17967. With the identity it chooses the largest rows or columns of the gradient itself, as
    Subspace-Momentum's "topk" (2024, arXiv 2411.07120).

    Args:
        matrix: "dct2" (columns are the cosines of the DCT-II), "dct3" (its transpose, the paper's),
            "random" (uniform over all orthogonal matrices) or "identity".
        norm: p, 1 or 2.
        left: the matrix for projections from the left, if another.
        seed: of the random matrix.

    Raises:
        ValueError: for a matrix or norm that is not known.
    """

    matrix: Matrix = "dct3"
    norm: int = 1
    left: Matrix | None = None
    seed: int = 0
    supports_both_sides = False

    @property
    def mixes_entries(self) -> bool:
        """See `Finder.mixes_entries`."""
        return "identity" not in (self.matrix, self.left)

    def __post_init__(self) -> None:
        for name in (self.matrix, self.left or self.matrix):
            if name not in get_args(Matrix):
                raise ValueError(f"matrix={name!r} must be {', '.join(get_args(Matrix))}")
        if (self.left or self.matrix) != self.matrix and "identity" in (self.matrix, self.left):
            raise ValueError(f"left={self.left!r} and matrix={self.matrix!r} differ in form")
        if self.norm not in (1, 2):
            raise ValueError(f"norm={self.norm!r} must be 1 or 2")

    @property
    def form(self) -> Form:  # type: ignore[override]
        """ "coordinates" for the identity, else "columns"."""
        return "coordinates" if self.matrix == "identity" else "columns"

    def find(self, sight: Sight) -> Subspace:
        layout, gradient = sight.layout, sight.gradient
        if layout.side == "entries":
            index = gradient.abs().flatten(-2).topk(layout.rank).indices
            return Entries(index.sort().values, layout.matrix)
        side, size = layout.one_side, layout.side_size
        along, across = (-2, -1) if side == "left" else (-1, -2)
        blocks, places = self._transformed(gradient, side)
        # A norm along columns would stride through memory.
        size_of = torch.abs if self.norm == 1 else torch.square
        weights = gradient.new_zeros(())
        for block in blocks:
            weights = weights + size_of(block).sum(across)
        if places is not None:
            weights = weights.index_select(-1, places)
        index, before = weights.topk(layout.rank).indices, None
        if sight.previous is None:
            index = index.sort().values
        else:
            assert isinstance(sight.previous, FixedColumns | Coordinates)
            before = sight.previous.index
            index = keep_slots(index, before, size)
            if index.dim() > 1:
                # Single matrices of a stack may have no gradient (experts that saw no token).
                silent = weights.sum(-1, keepdim=True) == 0
                index = torch.where(silent, before, index)
        if self.form == "coordinates":
            return Coordinates(side, index, size)
        vectors = self.vectors(side, size, gradient.dtype, gradient.device)
        place = index if places is None else places[index]
        taken = [take(block, place, along) for block in blocks]
        coordinates = taken[0] if len(taken) == 1 else torch.cat(taken, across)
        return FixedColumns(side, index, vectors, (gradient, coordinates), before)

    def indexed(
        self, index: Tensor, layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        if self.form == "coordinates":
            return super().indexed(index, layout, dtype, device)
        side = layout.one_side
        return FixedColumns(side, index, self.vectors(side, layout.side_size, dtype, device))

    def vectors(self, side: OneSide, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix's columns as rows, (size, size), for one side."""
        return shared_vectors(self._fixed(side), size, self.seed, dtype, device)

    def _fixed(self, side: OneSide) -> FixedMatrix:
        name = (self.left or self.matrix) if side == "left" else self.matrix
        assert name != "identity"
        return name

    def _transformed(
        self, gradient: Tensor, side: OneSide
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """G Q or Qᵀ G in blocks, and where its columns or rows are if not in order."""
        along, across = (-2, -1) if side == "left" else (-1, -2)
        blocks = gradient.split(_block(gradient, across), across)
        if self.form == "coordinates":
            return blocks, None
        size, name = gradient.shape[along], self._fixed(side)
        if name == "random" or size <= _SMALL_WIDTH:
            vectors = self.vectors(side, size, gradient.dtype, gradient.device)
            return [vectors @ b if side == "left" else b @ vectors.mT for b in blocks], None
        if name == "dct2":
            return [linalg.dct(block, along) for block in blocks], None
        places = shuffled_places(size, gradient.device)
        return [shuffled_inverse(block, along) for block in blocks], places


def _block(x: Tensor, dim: int) -> int:
    """How many slices along a dimension to treat at once, to keep temporaries small."""
    entries = _BLOCK.get(x.device.type, _BLOCK["other"])
    return max(1, entries * x.shape[dim] // max(1, x.numel()))
