"""COAP's finder: a basis nudged by gradient descent, and recomputed now and then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.subspaces.bases import Dense, Subspace
from subspan.subspaces.finder import Finder, OneSide, Sight
from subspan.subspaces.geometry import align_signs

_SMALLEST_NORM = 1e-8  # of a row, in its cosine
_CLIP = 1e-6  # added to the norm that is clipped


def sketched_rows(x: Tensor, test: Tensor) -> Tensor:
    """The right singular vectors of `Q^T x`, where Q is an orthonormal basis of `x test`.

    One pass of randomised SVD, r columns without oversampling. The vectors are computed as
    `(Q^T x)^T U` with the eigenvectors U of the r x r matrix `(Q^T x)(Q^T x)^T`.

    Args:
        x: (..., a, d).
        test: (..., d, r), Gaussian or a previous basis.

    Returns:
        (..., d, r), orthonormal, by decreasing singular value.
    """
    inside = linalg.orthonormalise(x @ test).mT @ x
    # In float64 the squares of small singular values keep their digits.
    exact = inside.double()
    vectors = torch.linalg.eigh(exact @ exact.mT)[1].to(inside.dtype)
    return linalg.orthonormalise(inside.mT @ vectors.flip(-1))


def loss_slope(basis: Tensor, gradient: Tensor, momentum: Tensor | None, side: OneSide) -> Tensor:
    """The derivative of COAP's loss with respect to the basis P.

        loss = mean((lift(project(G)) - G)^2) (1 - mean_i cos(lift(M)_i, G_i))

    with the cosines of the rows of the m x n matrices on both sides. P need not be orthonormal.
    Nothing of the size of G is formed.

    Args:
        basis: P, (..., d, r).
        gradient: G, (..., m, n).
        momentum: M, the first moment in the coordinates of P; None drops the second factor.
        side: of the basis.

    Returns:
        (..., d, r).
    """
    x = gradient if side == "right" else gradient.mT
    inside = x @ basis
    back, gram, energy = x.mT @ inside, basis.mT @ basis, inside.mT @ inside
    slope = back @ gram - 2.0 * back + basis @ energy
    slope.mul_(2.0 / (gradient.shape[-2] * gradient.shape[-1]))
    if momentum is None:
        return slope
    cosine, ascent = _mean_cosine(basis, gradient, momentum, inside, gram, side)
    missed = _missed_mean_square(gradient, gram, energy)
    return slope.mul_(1.0 - cosine).sub_(ascent.mul_(missed))


def _missed_mean_square(gradient: Tensor, gram: Tensor, energy: Tensor) -> Tensor:
    """`mean((lift(project(G)) - G)^2)` as `||G||^2 - 2 tr(E) + tr(E P^T P)`, E = P^T x^T x P."""
    whole = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True).square_()
    inside = energy.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    again = (energy * gram).sum((-2, -1), keepdim=True)
    entries = gradient.shape[-2] * gradient.shape[-1]
    return (whole - 2.0 * inside + again).clamp_(min=0.0).div_(entries)


def _mean_cosine(
    basis: Tensor, gradient: Tensor, momentum: Tensor, inside: Tensor, gram: Tensor, side: OneSide
) -> tuple[Tensor, Tensor]:
    """The mean cosine of the rows of `lift(M)` and G, (..., 1, 1), and its derivative by P.

    With a row's inner product p, norms a of `lift(M)_i` and b of `G_i`, its derivative is
    `d p / (a b) - (p / (a b)) (d a^2 / 2) / a^2`.
    """
    if side == "right":
        products = (momentum * inside).sum(-1, keepdim=True)
        squares = ((momentum @ gram) * momentum).sum(-1, keepdim=True)
    else:
        paired, own = gradient @ momentum.mT, momentum @ momentum.mT
        products = (basis * paired).sum(-1, keepdim=True)
        squares = ((basis @ own) * basis).sum(-1, keepdim=True)
    norms = squares.clamp(min=0.0).sqrt_().clamp_(min=_SMALLEST_NORM)
    others = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_(min=_SMALLEST_NORM)
    weights = (norms * others).reciprocal_()
    cosines = products * weights
    shares = cosines / norms.square()
    if side == "right":
        ascent = gradient.mT @ (weights * momentum) - basis @ (momentum.mT @ (shares * momentum))
    else:
        ascent = weights * paired - shares * (basis @ own)
    rows = gradient.shape[-2]
    return cosines.mean(-2, keepdim=True), ascent.div_(rows)


@dataclass(frozen=True)
class CoapNudge(Finder):
    """A basis that takes one small gradient step per refresh and is sometimes recomputed (COAP).

    Xiao et al.: COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection, 2024,
    arXiv 2412.00071. The step, with D of `loss_slope`:

        P <- P - nudge_lr D min(1, 1 / (||D|| + 1e-6))

    is not followed by an orthonormalisation. The first basis and recomputations are one pass of
    randomised SVD (`sketched_rows`) from a Gaussian matrix and from the previous basis.

    Args:
        recompute_every: steps; a refresh recomputes the basis when it is the first one since a
            multiple of them has passed (at steps 1 + k recompute_every for a refresh that falls on
            them). Buckets of several parameters recompute together.
        momentum: let the loss look at the first moment.
        nudge_lr: step size, 0.1 in the released code.
        sketch_seed: of the Gaussian matrix, the same for all parameters as in the released code
            (3407); None draws one for each parameter from the optimizer's `seed`.
    """

    recompute_every: int = 160
    momentum: bool = True
    nudge_lr: float = 0.1
    sketch_seed: int | None = None
    orthonormal = False
    supports_both_sides = False

    def __post_init__(self) -> None:
        if not isinstance(self.recompute_every, int) or self.recompute_every < 1:
            raise ValueError(
                f"recompute_every={self.recompute_every!r} must be an integer of at least 1"
            )
        if not 0.0 <= self.nudge_lr < float("inf"):
            raise ValueError(f"nudge_lr={self.nudge_lr!r} must be a finite number of at least 0")

    @property
    def reads_momentum(self) -> bool:  # type: ignore[override]
        """Whether the loss looks at the first moment."""
        return self.momentum

    def find(self, sight: Sight) -> Subspace:
        side, gradient = sight.layout.one_side, sight.gradient
        x = gradient if side == "right" else gradient.mT
        if not isinstance(sight.previous, Dense):
            found = sketched_rows(x, self._test_matrix(sight))
            return Dense(side, found, orthonormal=False)
        previous = sight.previous.dense(gradient.dtype)
        if self._recomputes(sight):
            found = align_signs(sketched_rows(x, previous), previous)
        else:
            slope = loss_slope(previous, gradient, sight.momentum, side)
            norm = torch.linalg.vector_norm(slope, dim=(-2, -1), keepdim=True)
            clip = (norm + _CLIP).reciprocal_().clamp_(max=1.0)
            found = previous - slope * (self.nudge_lr * clip)
        return Dense(side, found, orthonormal=False)

    def _recomputes(self, sight: Sight) -> bool:
        """Whether a multiple of `recompute_every` lies between the last refresh and this one."""
        last = min(sight.state["refreshed"])
        return (sight.step - 1) // self.recompute_every > (last - 1) // self.recompute_every

    def _test_matrix(self, sight: Sight) -> Tensor:
        shape, dtype = (sight.layout.side_size, sight.layout.rank), sight.gradient.dtype
        if self.sketch_seed is not None:
            return linalg.gaussian(self.sketch_seed, shape, dtype, sight.gradient.device)
        return sight.draw(lambda seed: linalg.gaussian(seed, shape, dtype))
