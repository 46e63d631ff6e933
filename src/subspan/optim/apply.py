"""Applying an update to the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Rate
from subspan.optim.parts.scene import Change, Seen, Update
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.bases import Subspace


def apply_update(
    weight: Tensor,
    update: Update,
    seen: Seen,
    state: dict[str, Any],
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
        state: the bucket's, in which a normaliser that divides the update has its averages.
        lr: learning rate, for the decay and for updates whose clipping comes before the learning
            rate.
        weight_decay: decay is `1 - lr * weight_decay`.
        parts: supplies `clip_rms` and the place of the decay.
        work: scratch memory.
    """
    gradient, subspace = seen.gradient, seen.subspace
    decay = 1.0 - lr * weight_decay if weight_decay else 1.0
    gain = decay if parts.inner.decay == "after" else 1.0
    normaliser = parts.normaliser
    if normaliser is not None and normaliser.after:
        if _takes_kernel(weight, update, seen, state, parts):
            assert subspace is not None and update.coordinates is not None
            lifted = subspace.lift(update.coordinates, out=work.like(weight))
            step, shrink = float(update.alpha * gain), 1.0 - float(decay)
            normaliser.step_weights(weight, gradient, lifted, state, step, shrink)
            return
        update.divisor = normaliser.divisor(gradient, seen.sums, state, work)
    if parts.clip_rms is None:
        _add(weight, update, gradient, subspace, decay, gain, work)
        return
    if subspace is None and update.coordinates is not None:
        total = update.coordinates.mul_(update.alpha)
    elif parts.normaliser is not None and not parts.normaliser.after and update.extra is None:
        total = _added_to_gradient(update, gradient, subspace)
    else:
        total = work.like(weight).zero_()
        _add(total, update, gradient, subspace, 1.0, -1.0, work)
    subtract_clipped(weight, total, root_mean_square(total), lr * gain, decay, parts.clip_rms)


def _takes_kernel(
    weight: Tensor, update: Update, seen: Seen, state: dict[str, Any], parts: Composition
) -> bool:
    """Whether lift and gradient, equally weighted, are all of an update that is divided."""
    plain = update.coordinates is not None and update.extra is None and update.loss is None
    even = isinstance(update.alpha, float) and update.alpha == update.scale
    if not (plain and even) or parts.clip_rms is not None or parts.normaliser is None:
        return False
    moments = [value for value in state.values() if isinstance(value, Tensor)]
    whole = all(moment.is_contiguous() for moment in moments)
    return whole and weight.is_contiguous() and parts.normaliser.can_step_weights(seen.sums)


def subtract_clipped(
    weight: Tensor, update: Tensor, rms: Tensor, lr: Rate, decay: Rate, clip_rms: float | None
) -> None:
    """`W <- decay W - lr update / max(1, rms / clip_rms)`, in place.

    Args:
        weight: `(..., m, n)`, or a vector.
        update: same shape.
        rms: its root mean squares, one per matrix, broadcastable to the weight.
        lr: learning rate, a number or one per matrix.
        decay: see above.
        clip_rms: None for no clipping.
    """
    if isinstance(decay, Tensor) or decay != 1.0:
        weight.mul_(decay)
    clip = torch.ones_like(rms) if clip_rms is None else (rms / clip_rms).clamp_(min=1.0)
    weight.addcmul_(update, clip.reciprocal_().mul_(lr), value=-1.0)


def _added_to_gradient(update: Update, gradient: Tensor, subspace: Subspace | None) -> Tensor:
    """U in the memory of the gradient, which a normaliser has made and nothing reads any more."""
    scale = 0.0 if update.scale is None else update.scale
    coordinates, alpha = update.coordinates, update.alpha
    if isinstance(scale, Tensor):
        gradient, scale = gradient.mul_(scale), 1.0
    if isinstance(alpha, Tensor) and coordinates is not None:
        coordinates, alpha = coordinates.mul_(alpha), 1.0
    if coordinates is None:
        gradient.mul_(scale)
    else:
        assert subspace is not None and not isinstance(alpha, Tensor)
        subspace.add_lift_(gradient, coordinates, alpha=alpha, beta=scale)
    if update.loss is not None:
        _add_loss(gradient, update.loss, -update.rate)
    return gradient


def _add(
    target: Tensor,
    update: Update,
    gradient: Tensor,
    subspace: Subspace | None,
    decay: Rate,
    gain: Rate,
    work: Workspace,
) -> None:
    """`target <- decay * target - gain * U`."""
    if update.divisor is not None and subspace is not None:
        update = _divided(update, gradient, subspace, work)
    whole = isinstance(decay, Tensor) or update.coordinates is None or subspace is None
    if whole and (isinstance(decay, Tensor) or decay != 1.0):
        target.mul_(decay)
    if update.coordinates is not None:
        coordinates, step = update.coordinates, update.alpha * gain
        if isinstance(step, Tensor):
            coordinates, step = coordinates.mul_(step), 1.0
        if subspace is None and update.divisor is not None:
            target.addcdiv_(coordinates, update.divisor, value=-step)
        elif subspace is None:
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
    if update.extra is not None and update.divisor is not None:
        target.addcdiv_(update.extra.mul_(gain), update.divisor, value=-1.0)
    elif update.extra is not None:
        target.sub_(update.extra.mul_(gain))
    if update.loss is not None:
        _add_loss(target, update.loss, update.rate * gain)


def _divided(update: Update, gradient: Tensor, subspace: Subspace, work: Workspace) -> Update:
    """The same update with a divisor of nothing but `extra`.

    A divisor per row commutes with a lift from the right, one per column with a lift from the left;
    any other is applied in full size.
    """
    divisor = update.divisor
    assert divisor is not None
    side = getattr(subspace, "side", None)
    commutes = (side == "right" and divisor.shape[-1] == 1) or (
        side == "left" and divisor.shape[-2] == 1
    )
    if commutes and update.extra is None and update.loss is None:
        coordinates = update.coordinates
        if coordinates is not None:
            coordinates = coordinates.div_(divisor)
        scale = None if update.scale is None else update.scale / divisor
        return replace(update, coordinates=coordinates, scale=scale, divisor=None)
    total, keep = work.like(gradient), 0.0  # a lift is written over what is there
    if update.coordinates is None:
        total, keep = total.zero_(), 1.0
    _add(total, replace(update, divisor=None), gradient, subspace, keep, -1.0, work)
    return Update(extra=total, divisor=divisor)


def _add_loss(target: Tensor, loss: Change, rate: Rate) -> None:
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
