"""Finders that look at a random part: of the singular vectors (SARA), of the heads (GaLore+)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.subspaces.bases import Dense, Subspace, TwoSided
from subspan.subspaces.finder import Finder, Sight
from subspan.subspaces.geometry import align_signs

# Weight of a singular value of zero, relative to the largest: drawn last, and then at random.
_NEVER = 1e-12

# Attention's projections whose output features (rows) are grouped in heads, and whose input
# features (columns) are.
_ROWS_IN_HEADS = re.compile(r"(^|[._])(q|k|v|qkv|wq|wk|wv|query|key|value)([._]|$)")
_COLUMNS_IN_HEADS = re.compile(r"att.*[._](o|wo|out|output)([._]|$)")


def sample_without_replacement(weights: Tensor, noise: Tensor, count: int) -> Tensor:
    """Indices drawn one after the other with probabilities proportional to the weights left.

    The `count` largest of `w_i / e_i` with independent exponential e_i are such a draw ("Weighted
    random sampling with a reservoir", Efraimidis and Spirakis, 2006).

    Args:
        weights: (..., k), at least 0. Those of zero are drawn last, at random.
        noise: (..., k), exponentially distributed.
        count: at most k.

    Returns:
        (..., count) int64, ascending.
    """
    largest = weights.amax(-1, keepdim=True)
    relative = weights / torch.where(largest > 0, largest, 1.0)
    keys = relative.clamp(min=_NEVER).log() - noise.log()
    return keys.topk(count, dim=-1).indices.sort(-1).values


@dataclass(frozen=True)
class ImportanceSampledSVD(Finder):
    """Singular vectors of the gradient, drawn with weights proportional to singular values (SARA).

    Zhang et al.: Breaking the Frozen Subspace: Importance Sampling for Low-Rank Optimization in LLM
    Pretraining, 2025, arXiv 2502.05790. Vectors are drawn one after the other without replacement
    and keep the order of their singular values. Where the gradient has fewer than r nonzero ones,
    all of them are taken and random other directions complete the basis. A refresh costs a full
    decomposition: a sketch of rank r would have no tail to draw from.
    """

    def find(self, sight: Sight) -> Subspace:
        if sight.layout.side == "both":
            left, values, right = torch.linalg.svd(sight.gradient, full_matrices=False)
            index = self.chosen(values, sight)
            old = sight.previous if isinstance(sight.previous, TwoSided) else None
            return TwoSided(
                _signed(_columns(left, index), None if old is None else old.left),
                _signed(_columns(right.mT, index), None if old is None else old.right),
            )
        side = sight.layout.one_side
        vectors, values = linalg.top_basis(
            sight.gradient, min(sight.layout.matrix), side=side, return_values=True
        )
        previous = sight.previous.basis if isinstance(sight.previous, Dense) else None
        return Dense(side, _signed(_columns(vectors, self.chosen(values, sight)), previous))

    def chosen(self, values: Tensor, sight: Sight) -> Tensor:
        """The places (..., r) of the drawn vectors among the singular values (..., k)."""
        noise = sight.draw(lambda seed: _exponential(seed, values.shape[-1], values.dtype))
        return sample_without_replacement(values, noise, sight.layout.rank)


def _columns(vectors: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(vectors, index.unsqueeze(-2), -1)


def _signed(basis: Tensor, previous: Tensor | None) -> Tensor:
    """Columns that meet their predecessor get its sign, others a positive largest entry.

    A vector drawn anew is orthogonal to the one in its slot before, so the sign of their product,
    and with it that of kept moments, would be one of rounding errors.
    """
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    if previous is not None:
        product = (basis * previous).sum(-2, keepdim=True)
        largest = torch.where(product.abs() > 0.5, product, largest)
    return basis * torch.where(largest < 0, -1.0, 1.0)


def _exponential(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Independent draws from the exponential distribution, made on the CPU."""
    drawn = torch.empty(size, dtype=dtype).exponential_(generator=linalg.generator(seed))
    return drawn.clamp_(min=torch.finfo(dtype).tiny)


@dataclass(frozen=True)
class HeadSketch(Finder):
    """One attention head's gradient supplies the basis of all heads (GaLore+, experimental).

    Liao et al.: GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection, 2024,
    arXiv 2412.19820; reconstructed from the abstract and reviews, no code is public.

    Of a query, key or value projection with a basis on the right, the rows of one head (of as many
    as the rank needs), drawn at every refresh, are sketched instead of all rows; of an output
    projection with a basis on the left, the columns of one head. They are known by their usual
    names (q_proj, wq, query, attention.output, ...); all other matrices are sketched whole. The
    sketch is randomised subspace iteration, warm-started from the previous basis.

    Args:
        head_dim: features per head. Matrices that do not divide into heads are sketched whole, and
            so are those of a single head.
        oversampling: extra columns of the sketch.
        power_iterations: rounds beyond the first for a cold start; a warm start takes one fewer.
    """

    head_dim: int = 128
    oversampling: int = 8
    power_iterations: int = 1
    supports_both_sides = False

    def __post_init__(self) -> None:
        for name, least in (("head_dim", 1), ("oversampling", 0), ("power_iterations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")

    def find(self, sight: Sight) -> Subspace:
        side = sight.layout.one_side
        x = sight.gradient if side == "right" else sight.gradient.mT
        start = self._start(sight)
        count = x.shape[-2] // self.head_dim
        divides = count > 1 and x.shape[-2] % self.head_dim == 0
        # Parameters of one bucket have equal shapes but may be different projections.
        headed = [divides and _in_heads(layout.name, side) for layout in sight.layouts]
        if not any(headed):
            return Dense(side, self._sketched(x, start, sight))
        heads = self._some_heads(x, sight, count)
        if all(headed):
            return Dense(side, self._sketched(heads, start, sight))
        basis = torch.empty_like(start[..., : sight.layout.rank])
        for source, wanted in ((heads, True), (x, False)):
            rows = [row for row, own in enumerate(headed) if own == wanted]
            basis[rows] = self._sketched(source[rows], start[rows], sight)
        return Dense(side, basis)

    def _start(self, sight: Sight) -> Tensor:
        """The previous basis with some Gaussian columns, or only those."""
        size, rank = sight.layout.side_size, sight.layout.rank
        previous = sight.previous if isinstance(sight.previous, Dense) else None
        columns = self.oversampling + (rank if previous is None else 0)
        shape = (size, min(columns, size))
        drawn = sight.draw(lambda seed: linalg.gaussian(seed, shape, sight.gradient.dtype))
        if previous is None:
            return drawn
        # Unit-norm columns, so that the fresh directions weigh as much as the old ones.
        return torch.cat([previous.dense(drawn.dtype), drawn / size**0.5], dim=-1)

    def _sketched(self, x: Tensor, start: Tensor, sight: Sight) -> Tensor:
        warm = isinstance(sight.previous, Dense)
        rounds = max(0, self.power_iterations - 1) if warm else self.power_iterations
        rank = sight.layout.rank
        found = linalg.sketched_basis(x, rank, side="right", sketch=start, power_iterations=rounds)
        return align_signs(found, start[..., :rank]) if warm else found

    def _some_heads(self, x: Tensor, sight: Sight, count: int) -> Tensor:
        """The rows of randomly drawn heads, of as many as the rank needs."""
        needed = min(count, math.ceil(sight.layout.rank / self.head_dim))
        index = sight.draw(
            lambda seed: linalg.random_coordinates(linalg.derive_seed(seed, 1), count, needed)
        )
        heads = x.unflatten(-2, (count, self.head_dim))
        picked = torch.take_along_dim(heads, index[..., None, None], -3)
        return picked.flatten(-3, -2)


def _in_heads(name: str, side: str) -> bool:
    pattern = _ROWS_IN_HEADS if side == "right" else _COLUMNS_IN_HEADS
    return pattern.search(name.lower()) is not None
