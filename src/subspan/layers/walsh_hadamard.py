"""LBP-WHT: a linear layer on image tokens with a low-rank backward.

From "Efficient Low-rank Backpropagation for Vision Transformer Adaptation" (2023,
arXiv:2309.15275). The tokens of an image stand on an h x w grid, cut into patches of o x o. In each
patch and channel a signal is written in two-dimensional Walsh functions B_pq = walsh_p walsh_qᵀ of
p and q sign changes; the backward keeps those with p + q < k ("LP_L1-k"), r = k (k + 1) / 2 of the
o² for k <= o. With B: (o², r) their columns,

    forward    y = x Wᵀ + b (exact), and keep X = Bᵀ x: r values per patch and channel, not o²
    backward   Y = Bᵀ dy / o²,  dx = B (Y W),  dW = sum of Yᵀ X over patches,  db = sum of dy

With all functions, k = 2 o - 1, B Bᵀ = o² I and the backward is exact. A grid that o does not
divide is extended by reflection, by the larger half above and to the left: the reflected tokens
count twice in dW. Class tokens stand outside the grid; their gradients are exact.

Departures from the authors' code: `order` must be a power of two (theirs cuts a larger Walsh
matrix, whose rows are then not orthogonal), and a grid that was not given is inferred at every
call, not once for all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import autocast_dtype
from .convert import Patterns, replace_linear
from .walsh import check_grid, coefficients_of, low_pass_functions, tokens_of


class WalshHadamardLinear(nn.Linear):
    """`nn.Linear` on image tokens with the backward of LBP-WHT (see the top of this module).

    The forward is exact. The low-rank backward is used in training mode; in evaluation mode the
    gradients are exact. What the backward keeps of the input is rank / order² of it.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        order: o, side of a patch in tokens, a power of two.
        lp_tri_order: k, how many low frequencies: those with p + q < k; 1 to 2 order - 1, which is
            all. The paper reports 2, 4 and 8.
        spatial: (h, w) of the token grid. When None, that of a four-dimensional input, and for a
            three-dimensional one a square.
        class_tokens: tokens before those of the grid.

    Shapes:
        input (batch, class_tokens + h w, in_features), or (batch, h, w, in_features) without class
        tokens; output the same with out_features.

    Raises:
        ValueError: `order`, `lp_tri_order`, `spatial` or `class_tokens` out of range; in the
            forward, an input whose tokens do not make the grid.
    """

    functions: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        order: int = 8,
        lp_tri_order: int = 4,
        spatial: tuple[int, int] | None = None,
        class_tokens: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if class_tokens < 0:
            raise ValueError(f"class_tokens must not be negative, got {class_tokens}")
        functions = low_pass_functions(order, lp_tri_order).to(self.weight)
        self.register_buffer("functions", functions, persistent=False)
        if spatial is not None:
            # A pair read from a file is a list.
            spatial = (spatial[0], spatial[1])
            check_grid(*spatial, order)
        self.order, self.lp_tri_order = order, lp_tri_order
        self.spatial, self.class_tokens = spatial, class_tokens

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> WalshHadamardLinear:
        """The layer with the very parameters of `linear`; `options` are the constructor's own."""
        biased = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, biased, "meta", **options)
        functions = low_pass_functions(layer.order, layer.lp_tri_order)
        layer.functions = functions.to(linear.weight.device, linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    @property
    def rank(self) -> int:
        """Walsh functions kept of a patch's order²."""
        return self.functions.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        h, w = self._grid(input)
        dtype = autocast_dtype(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        tokens = input.to(dtype).flatten(1, -2)
        functions = self.functions.to(dtype)
        y = _LowPassBackward.apply(
            tokens, self.weight.to(dtype), bias, functions, (h, w), self.class_tokens
        )
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, order={self.order}, lp_tri_order={self.lp_tri_order}, "
            f"spatial={self.spatial}, class_tokens={self.class_tokens}"
        )

    def _grid(self, input: Tensor) -> tuple[int, int]:
        """(h, w) of the tokens of `input`."""
        tokens = math.prod(input.shape[1:-1]) - self.class_tokens
        if input.dim() == 4 and self.class_tokens == 0:
            h, w = input.shape[1:3]
        elif input.dim() == 3 and self.spatial is not None:
            h, w = self.spatial
        elif input.dim() == 3 and tokens > 0:
            h = w = math.isqrt(tokens)
        else:
            raise ValueError(
                "input must be (batch, class_tokens + h * w, in_features), or (batch, h, w, "
                f"in_features) without class tokens, got the shape {tuple(input.shape)} with "
                f"class_tokens={self.class_tokens}"
            )
        if (self.spatial or (h, w)) != (h, w) or h * w != tokens:
            raise ValueError(
                f"the tokens of input of shape {tuple(input.shape)} with "
                f"class_tokens={self.class_tokens} do not make a grid of "
                f"{f'spatial={self.spatial}' if self.spatial else 'equal sides'}"
            )
        check_grid(h, w, self.order)
        return h, w


class _LowPassBackward(torch.autograd.Function):
    """y = x Wᵀ + b; x: (batch, class_tokens + h w, in), functions: (order², rank)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        functions: Tensor,
        grid: tuple[int, int],
        class_tokens: int,
    ) -> Tensor:
        ctx.grid, ctx.class_tokens = grid, class_tokens
        first, coefficients = None, None
        if ctx.needs_input_grad[1]:
            coefficients = coefficients_of(x, functions, grid, class_tokens)
            # A view would keep the whole input.
            first = x[:, :class_tokens].clone()
        ctx.save_for_backward(first, coefficients, weight, functions)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, coefficients, weight, functions = ctx.saved_tensors
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        first_grad = grad[:, : ctx.class_tokens]
        if x_needed or weight_needed:
            mean = coefficients_of(grad, functions, ctx.grid, ctx.class_tokens)
            mean.div_(functions.shape[0])
        if x_needed:
            grad_x = tokens_of(mean @ weight, functions, ctx.grid)
            if ctx.class_tokens:
                grad_x = torch.cat([first_grad @ weight, grad_x], dim=1)
        if weight_needed:
            grad_weight = mean.flatten(0, -2).mT @ coefficients.flatten(0, -2)
            if ctx.class_tokens:
                grad_weight.addmm_(first_grad.flatten(0, 1).mT, first.flatten(0, 1))
        grad_bias = grad.sum((0, 1)) if bias_needed else None
        return grad_x, grad_weight, grad_bias, None, None, None


def lbp_wht(
    model: nn.Module,
    *,
    order: int = 8,
    lp_tri_order: int = 4,
    spatial: tuple[int, int] | None = None,
    class_tokens: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Replace linear layers on image tokens by `WalshHadamardLinear`, in place, sharing parameters.

    Args:
        model: with `nn.Linear` layers; all that are chosen see tokens of one kind of grid.
        order: side of a patch in tokens, a power of two.
        lp_tri_order: kept are the Walsh functions with p + q < lp_tri_order.
        spatial: (h, w) of the token grid; when None, inferred at every call.
        class_tokens: tokens before those of the grid.
        include: regular expressions; exactly the layers whose name one of them matches (anywhere).
            When None all but the output heads, recognised by name as
            `subspan.optim.selection.is_projected_by_name` does.
        exclude: regular expressions of names to leave alone.

    Returns:
        `model`, or the new layer if the model is itself an `nn.Linear`.

    Raises:
        ValueError: an option out of range, or a pattern that is no regular expression or matches no
            linear layer.
    """

    def build(linear: nn.Linear) -> nn.Linear:
        return WalshHadamardLinear.from_linear(
            linear,
            order=order,
            lp_tri_order=lp_tri_order,
            spatial=spatial,
            class_tokens=class_tokens,
        )

    return replace_linear(model, nn.Linear, build, include=include, exclude=exclude)
