"""Norms of the channels of a matrix, and the limiter that lets them grow slowly.

A channel is what has coordinates of its own: a column when the left side is projected, else a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.optim.parts.scene import Scene
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

TINY = 1e-8


def check_growth_limit(limit: float | None) -> None:
    """Refuse a limiter that would forbid a constant norm.

    Raises:
        ValueError: if `limit` is a number below 1.
    """
    if limit is not None and not limit >= 1.0:
        raise ValueError(f"growth_limit={limit!r} must be at least 1, or None for no limiter")


def limiter_declaration(limit: float | None) -> tuple[StateDeclaration, ...]:
    """One norm per matrix; infinite before the first step, which therefore is never limited."""
    return (
        ()
        if limit is None
        else (StateDeclaration("update_norm", "scalar", "scalar", fill=math.inf),)
    )


def limit_growth(
    factor: Tensor, norms: Tensor, scene: Scene, limit: float, front: float = 1.0
) -> Tensor:
    """Channel factors, lowered where the update's norm would exceed `limit` times the last one.

    The last one is updated in place. A zero norm leaves the memory alone: after a zero gradient the
    next update would otherwise start from 1e-8.

    Args:
        factor: one factor per channel, `(..., 1, n)` or `(..., m, 1)`, or per matrix.
        norms: of the update's channels, same shape.
        scene: whose state holds "update_norm", one number per matrix.
        limit: largest growth per step.
        front: what the remembered norms are multiplied with.
    """
    last = scene.state["update_norm"]
    norm = scene.norm(norms, (-2, -1))
    if front != 1.0:
        norm.mul_(front)
    allowed = (last + TINY).mul_(limit)
    lowered = (allowed / norm).clamp_(max=1.0)
    last.copy_(torch.where(norm > 0, torch.minimum(norm, allowed), last))
    return factor * lowered[..., None, None]


def channel_norms(x: Tensor, layout: Layout, work: Workspace) -> Tensor:
    """Norm of every column (left, `(..., 1, n)`) or row (right, `(..., m, 1)`)."""
    if layout.side != "left":
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # A norm along columns strides through memory; squaring first and summing rows does not.
    squares = torch.mul(x, x, out=work.like(x))
    norms = squares.sum(-2, keepdim=True).sqrt_()
    work.give_back(squares)
    return norms


def channel_factors(scene: Scene, inside: Tensor) -> Tensor:
    """How much the inner optimizer rescaled every column (left) or row (right).

    Args:
        scene: the bucket.
        inside: `channel_norms` of the coordinates.
    """
    return channel_norms(scene.direction.value, scene.layout, scene.work).div_(inside + TINY)


def tensor_factor(scene: Scene) -> Tensor:
    """How much the inner optimizer rescaled the coordinates as a whole, `(..., 1, 1)`."""
    dims = (-1,) if scene.layout.side == "entries" else (-2, -1)
    scaled = scene.norm(scene.direction.value, dims)
    return scaled.div_(scene.norm(scene.coordinates, dims).add_(TINY))[..., None, None]


def residual_norms(scene: Scene, inside: Tensor, share: float) -> Tensor:
    """Norm of every column or row of `G - share lift(R)`, without forming it.

    `||G_j||^2 - 2 share ||R_j||^2 + share^2 ||lift(R)_j||^2`, where the last norm is that of the
    coordinates for an orthonormal basis and is weighted with the r x r Gram matrix otherwise.

    Args:
        scene: the bucket.
        inside: `channel_norms` of the coordinates, `||R_j||`.
        share: see above.
    """
    squares = scene.norms.square()
    if scene.subspace.orthonormal:
        squares.addcmul_(inside, inside, value=share * (share - 2.0))
    else:
        basis = scene.subspace.dense(inside.dtype)
        assert isinstance(basis, Tensor)
        gram = basis.mT @ basis
        r = scene.coordinates
        left = scene.layout.side == "left"
        turned = (gram @ r if left else r @ gram).mul_(r)
        lifted = turned.sum(-2 if left else -1, keepdim=True)
        squares.addcmul_(inside, inside, value=-2.0 * share).add_(lifted, alpha=share * share)
    return squares.clamp_(min=0.0).sqrt_()
