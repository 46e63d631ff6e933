"""The product of a linear layer with a quantised weight, which keeps no float copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_dtype

if TYPE_CHECKING:
    from .quantised_weight import QuantisedWeight


def quantised_linear(input: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a quantised weight; the same names of arguments.

    Computed in the dtype of the input, or in autocast's.
    """
    dtype = autocast_dtype(input)
    bias = None if bias is None else bias.to(dtype)
    return _Linear.apply(input.to(dtype), weight, bias)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b that keeps x and the codes, and dequantises again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
        x_needed, weight_needed, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_needed else None, weight if x_needed else None)
        return F.linear(x, weight.dequantise(dtype=x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight.dequantise(dtype=grad.dtype) if x_needed else None
        grad_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if weight_needed else None
        return grad_x, grad_weight, rows.sum(0) if bias_needed else None
