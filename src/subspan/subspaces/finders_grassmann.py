"""Finders that walk from one basis to the next instead of finding a new one.

Both walk along a geodesic of the Grassmannian: towards the gradient (SubTrack++), or in a random
direction (GrassWalk). A walk needs products of the size of a projection and the eigenvectors of one
r x r matrix; the basis is made exactly orthonormal again on the way, so rounding errors (and those
of a basis stored in few bits) do not add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg.orthonormal import divisor
from subspan.subspaces.bases import Dense, Subspace
from subspan.subspaces.finder import Finder, Sight
from subspan.subspaces.geometry import horizontal
from subspan.subspaces.layout import Layout, StateDeclaration


def track(basis: Tensor, x: Tensor, step: float) -> Tensor:
    """Turn a basis towards the columns of `x`, by the leading direction of steepest descent.

    The descent is that of the projection error `||x - S S^T x||_F^2`:

        A = S^T x,  F = -2 (x - S A) A^T = s u v^T + ...
        S <- S + (S v (cos(step s) - 1) - u sin(step s)) v^T

    The residual is never formed: its product with A^T is the horizontal part of `x A^T`, and the
    leading singular triple of F comes from the eigenvectors of the r x r matrix F^T F.

    Args:
        basis: S, (..., d, r), nearly orthonormal.
        x: (..., d, n).
        step: radians per unit of s, which is quadratic in `x`.

    Returns:
        (..., d, r), orthonormal.
    """
    basis = _polished(basis)
    if basis.shape[-1] == basis.shape[-2]:
        return basis  # nothing is outside of it
    # Projected twice: once leaves a part inside that is as large as the product's rounding errors,
    # which is not small against the rest when the gradient lies almost inside the subspace.
    product = x @ (basis.mT @ x).mT
    descent = horizontal(basis, horizontal(basis, product)).mul_(-2.0)
    size = divisor(descent.abs().amax((-2, -1), keepdim=True))  # squares must not underflow
    scaled = descent / size
    right = torch.linalg.eigh(scaled.mT @ scaled)[1][..., -1:]
    left = scaled @ right
    length = torch.linalg.vector_norm(left, dim=-2, keepdim=True)
    angle = step * (length * size)
    # cos(a) - 1 = -2 sin(a / 2)^2: no cancellation for short steps.
    turned = (basis @ right).mul_(-2.0 * torch.sin(angle / 2).square())
    turned -= left * (torch.sin(angle) / divisor(length))
    return basis + turned @ right.mT


def walk(basis: Tensor, x: Tensor, step: float, *, normalise: bool) -> Tensor:
    """Walk from a basis along the horizontal part H of `x`: the exponential map.

        H = x - S S^T x = U D V^T;   S <- (S V cos(step D) + U sin(step D)) V^T

    computed as `S f(K) + H g(K)` with K = H^T H, f = cos(step sqrt(K)) and
    g = sin(step sqrt(K)) / sqrt(K): no singular vectors of the d x r matrix are needed.

    Args:
        basis: S, (..., d, r), nearly orthonormal.
        x: (..., d, r).
        step: radians per unit of D.
        normalise: divide H by its largest singular value, so that `step` is the largest angle.

    Returns:
        (..., d, r), orthonormal.
    """
    basis = _polished(basis)
    if basis.shape[-1] == basis.shape[-2]:
        return basis  # there is no direction to walk in
    tangent = horizontal(basis, x)
    squares, vectors = torch.linalg.eigh(tangent.mT @ tangent)
    values = squares.clamp(min=0.0).sqrt().unsqueeze(-2)
    rate = torch.full_like(values[..., :1], step)
    if normalise:
        rate /= divisor(values.amax(-1, keepdim=True))
    angles = rate * values
    kept = (vectors * torch.cos(angles)) @ vectors.mT
    added = (vectors * (rate * torch.sinc(angles / math.pi))) @ vectors.mT
    return basis @ kept + tangent @ added


def _polished(basis: Tensor) -> Tensor:
    """The nearest orthonormal basis, to second order in the error: one Newton step of the polar
    factor, `S (3 I - S^T S) / 2`."""
    return 1.5 * basis - basis @ (0.5 * (basis.mT @ basis))


@dataclass(frozen=True)
class GrassmannTracking(Finder):
    """One basis per matrix that follows the gradient along rank-one geodesics (SubTrack++).

    Rajabi, Nonta, Rambhatla: SubTrack++: Gradient Subspace Tracking for Scalable LLM Training,
    2025, arXiv 2502.01586; see `track`. The first basis is exact.

    Args:
        step_size: the paper's eta. Its unit is radians per squared unit of the gradient: gradients
            ten times as large turn the basis by a hundred times the angle.
        as_released: do what the released code does. It leaves bases on the right side where they
            are, and remembers the first basis (`first_basis`), which its transport of the moments
            reads (`FirstBasisAware`).
    """

    step_size: float = 10.0
    as_released: bool = False
    supports_both_sides = False

    def __post_init__(self) -> None:
        _check_step_size(self.step_size)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The basis, and the first one for the released transport."""
        declared = super().declare(layout)
        if self.as_released:
            declared += (StateDeclaration("first_basis", "basis", "basis"),)
        return declared

    def find(self, sight: Sight) -> Subspace:
        side, gradient = sight.layout.one_side, sight.gradient
        if not isinstance(sight.previous, Dense):
            found = _first(sight)
            if self.as_released:
                sight.state["first_basis"] = found.basis
            return found
        if self.as_released and side == "right":
            return sight.previous
        columns = gradient if side == "left" else gradient.mT
        return Dense(side, track(sight.previous.dense(gradient.dtype), columns, self.step_size))


@dataclass(frozen=True)
class GrassmannWalk(Finder):
    """A random walk on the Grassmannian (GrassWalk).

    Rajabi, Nonta, Vajpayee, Rambhatla: Randomized Gradient Subspaces for Efficient Large Language
    Model Training, 2025, arXiv 2510.01878; see `walk`. The direction is the horizontal part of a
    Gaussian matrix, drawn at every refresh; the first basis holds the leading singular vectors of
    the gradient.

    Args:
        step_size: the largest angle of a refresh in radians with `normalise`, else radians per unit
            singular value of the direction, of which the largest is about sqrt(d) + sqrt(r).
        normalise: divide the direction by its largest singular value.
    """

    step_size: float = 0.1
    normalise: bool = True
    supports_both_sides = False

    def __post_init__(self) -> None:
        _check_step_size(self.step_size)

    def find(self, sight: Sight) -> Subspace:
        if not isinstance(sight.previous, Dense):
            return _first(sight)
        basis = sight.previous.dense(sight.gradient.dtype)
        direction = self.direction(sight)
        walked = walk(basis, direction, self.step_size, normalise=self.normalise)
        return Dense(sight.layout.one_side, walked)

    def direction(self, sight: Sight) -> Tensor:
        """The Gaussian matrix (..., d, r) whose horizontal part is walked along."""
        shape = (sight.layout.side_size, sight.layout.rank)
        return sight.draw(lambda seed: linalg.gaussian(seed, shape, sight.gradient.dtype))


def _first(sight: Sight) -> Dense:
    side = sight.layout.one_side
    return Dense(side, linalg.top_basis(sight.gradient, sight.layout.rank, side=side))


def _check_step_size(step_size: float) -> None:
    number = isinstance(step_size, (int, float)) and not isinstance(step_size, bool)
    if not number or not math.isfinite(step_size) or step_size < 0:
        raise ValueError(f"step_size={step_size!r} must be a finite number of at least 0")
