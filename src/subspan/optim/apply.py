"""Applying an update to the weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Rate
from subspan.optim.parts.scene import MomentumLoss, Seen, Update
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.bases import Subspace


def apply_update(
    weight: Tensor,
    update: Update,
    seen: Seen,
    lr: Rate,
    weight_decay: float,
    parts: Composition,
    work: Workspace,
) -> None:
    """`W <- decay W - U`, or `decay (W - U)` if the inner optimizer decays last; in place.

    Args:
        weight: `(..., m, n)`, or any shape without a subspace.
        update: the terms of U; overwritten.
        seen: the gradient, and the subspace that lifts coordinates, if there is one.
        lr: learning rate, for the decay and for updates whose clipping comes before the learning
            rate.
        weight_decay: decay is `1 - lr * weight_decay`.
        parts: supplies `clip_rms` and the place of the decay.
        work: scratch memory.
    """
    gradient, subspace = seen.gradient, seen.subspace
    decay = 1.0 - lr * weight_decay if weight_decay else 1.0
    gain = decay if parts.inner.decay == "after" else 1.0
    if parts.clip_rms is None:
        _add(weight, update, gradient, subspace, decay, gain)
        return
    if subspace is None and update.coordinates is not None:
        total = update.coordinates.mul_(-update.alpha)
    else:
        total = work.like(weight).zero_()
        _add(total, update, gradient, subspace, 1.0, 1.0)
    rms = root_mean_square(total)
    total.mul_((rms / parts.clip_rms).clamp_(min=1.0).reciprocal_().mul_(lr * gain))
    weight.mul_(decay).add_(total)


def _add(
    target: Tensor,
    update: Update,
    gradient: Tensor,
    subspace: Subspace | None,
    decay: Rate,
    gain: Rate,
) -> None:
    """`target <- decay * target - gain * U`."""
    if update.divisor is not None:
        update = _divided(target, update, gradient, subspace)
    whole = isinstance(decay, Tensor) or update.coordinates is None or subspace is None
    if whole and (isinstance(decay, Tensor) or decay != 1.0):
        target.mul_(decay)
    if update.coordinates is not None:
        coordinates, step = update.coordinates, update.alpha * gain
        if isinstance(step, Tensor):
            coordinates, step = coordinates.mul_(step), 1.0
        if subspace is None:
            target.add_(coordinates, alpha=-step)
        else:
            beta = 1.0 if isinstance(decay, Tensor) else decay
            subspace.add_lift_(target, coordinates, alpha=-step, beta=beta)
    if update.scale is not None:
        scale = update.scale * gain
        if isinstance(scale, Tensor):
            target.addcmul_(gradient, scale, value=-1.0)
        else:
            target.add_(gradient, alpha=-scale)
    if update.extra is not None:
        target.sub_(update.extra.mul_(gain))
    if update.loss is not None:
        _add_loss(target, update.loss, update.rate * gain)


def _divided(target: Tensor, update: Update, gradient: Tensor, subspace: Subspace | None) -> Update:
    """The same update without a divisor.

    A divisor per row commutes with a lift from the right, one per column with a lift from the left;
    any other is applied in full size.
    """
    divisor = update.divisor
    assert divisor is not None
    side = getattr(subspace, "side", None)
    commutes = (
        subspace is None
        or (side == "right" and divisor.shape[-1] == 1)
        or (side == "left" and divisor.shape[-2] == 1)
    )
    if commutes and update.extra is None and update.loss is None:
        coordinates = update.coordinates
        if coordinates is not None:
            coordinates = coordinates.div_(divisor)
        scale = None if update.scale is None else update.scale / divisor
        return replace(update, coordinates=coordinates, scale=scale, divisor=None)
    total = torch.zeros_like(target)
    _add(total, replace(update, divisor=None), gradient, subspace, 1.0, -1.0)
    return Update(extra=total.div_(divisor))


def _add_loss(target: Tensor, loss: MomentumLoss, rate: Rate) -> None:
    """`target <- target - rate * loss`.

    A rate that differs between matrices needs the loss in full size.
    """
    if not isinstance(rate, Tensor):
        loss.add_to_(target, -rate)
        return
    total = target.new_zeros(target.shape)
    loss.add_to_(total, 1.0)
    target.sub_(total.mul_(rate))


def root_mean_square(x: Tensor) -> Tensor:
    """Root mean square of every matrix, `(..., 1, 1)`, or of a vector, `(1,)`.

    Makes no temporary of the size of `x`.
    """
    dims = (-2, -1) if x.dim() >= 2 else (-1,)
    count = math.prod(x.shape[dim] for dim in dims)
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True).div_(math.sqrt(count))
