"""Flora's step on matrices that are not projected, in blocks of rows.

Embeddings and output layers are by far the largest matrices of a language model. Their normalised
gradient, which Flora averages into the momentum, is made block by block and never whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from subspan.optim.apply import subtract_clipped
from subspan.optim.bucket import Bucket
from subspan.optim.collect import check_bucket, checked_in_bucket
from subspan.optim.composition import Composition
from subspan.optim.parts.adafactor import (
    block_length,
    mean_squares,
    row_blocks,
    scale_factors,
    scale_rows,
)
from subspan.optim.parts.descent import AverageMomentum
from subspan.optim.parts.inner import Rate
from subspan.optim.parts.normaliser import FactoredRMS
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout


def steps_in_rows(parts: Composition, layout: Layout) -> bool:
    """Whether `step_in_rows` takes the step of a parameter of that layout."""
    averages = isinstance(parts.inner, AverageMomentum) and parts.inner.beta2 is None
    factored = isinstance(parts.normaliser, FactoredRMS) and layout.is_matrix
    return parts.finder is None and averages and factored


def step_in_rows(
    bucket: Bucket,
    weight: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    parts: Composition,
    lr: Rate,
    work: Workspace,
) -> None:
    """The step of a bucket of matrices whose normalised gradient is averaged into a momentum.

        M <- b M + (1 - b) Adafactor(G);  W <- decay W - lr M / max(1, rms(M) / clip_rms)

    Args:
        bucket: whose gradients they are.
        weight: `(..., m, n)`, updated in place.
        state: its loaded state, updated in place.
        group: its param group.
        parts: what updates it; see `steps_in_rows`.
        lr: learning rate, a number or one per matrix.
        work: scratch memory.

    Raises:
        FloatingPointError: the gradient is not finite; nothing has changed.
    """
    normaliser, gradient = parts.normaliser, bucket.gather(bucket.gradients, work)
    assert isinstance(normaliser, FactoredRMS)
    *lead, m, n = gradient.shape
    block = *lead, min(m, block_length(gradient)), n
    scratch = work.take(block, gradient.dtype, gradient.device)
    means = mean_squares(gradient, normaliser.eps, scratch)
    # Finite squares come from a finite gradient; those that overflow need not.
    if checked_in_bucket(group, bucket.device) and not math.isfinite(means[0].sum().item()):
        check_bucket(bucket, gradient)
    share = float(bucket.step) ** normaliser.decay_rate
    row, column = scale_factors(means, state, share, "gradient_sq")

    moment, new = state["exp_avg"], 1.0 - parts.inner.momentum_weight
    squares = weight.new_zeros((*weight.shape[:-2], 1, 1))
    for rows in row_blocks(gradient):
        out = scratch.view(-1)[: gradient[..., rows, :].numel()].view(gradient[..., rows, :].shape)
        part = moment[..., rows, :].lerp_(scale_rows(gradient, row, column, rows, out), new)
        squares += torch.linalg.vector_norm(part, dim=(-2, -1), keepdim=True).square_()
    rms = squares.div_(math.prod(weight.shape[-2:])).sqrt_()
    subtract_clipped(weight, moment, rms, lr, 1.0 - lr * group["weight_decay"], parts.clip_rms)
