"""Large gradients in blocks of rows: output layers and embeddings in the backward pass.

The gradients of a language model's embedding and output layer are by far its largest. When their
update is elementwise, a block of rows of the gradient can be computed, applied and dropped before
the next one, so that the whole never exists. That needs a backward pass of its own for the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from subspan.optim.bucket import is_quantised, keep_numbers, piece
from subspan.optim.collect import bucket_of, check_bucket, update_elementwise
from subspan.optim.parts.workspace import Workspace

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer

# Entries of a block; weights up to this size keep their ordinary gradient.
BLOCK = 1 << 18

Update = Callable[[Tensor, Callable[[int, int], Tensor]], None]


class RowwiseUpdates:
    """Replaces the backward pass of layers whose weights are updated in blocks of rows.

    Args:
        optimizer: updates them.
        done: list to which updated weights are added.
    """

    def __init__(self, optimizer: SubspaceOptimizer, done: list[Tensor]) -> None:
        self._optimizer, self._done = optimizer, done
        self._modules: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        """Take over the linear and embedding layers of a model that allow it.

        Left alone are small weights, weights used by several layers (their gradient is a sum), and
        those whose update looks at more than single entries.
        """
        uses: dict[int, int] = {}
        for module in model.modules():
            for weight in module._parameters.values():
                if weight is not None:
                    uses[id(weight)] = uses.get(id(weight), 0) + 1
        for module in model.modules():
            if type(module) not in (nn.Linear, nn.Embedding) or uses[id(module.weight)] > 1:
                continue
            if isinstance(module, nn.Embedding) and (
                module.max_norm is not None or module.sparse or module.scale_grad_by_freq
            ):
                continue
            if self._allows(module.weight):  # type: ignore[arg-type]
                kind: Callable[..., Tensor] = _embedding
                if isinstance(module, nn.Linear):
                    kind = _linear
                module.forward = partial(kind, module, self.update)
                self._modules.append(module)

    def detach(self) -> None:
        """Give the layers their own forward methods back."""
        for module in self._modules:
            del module.forward
        self._modules.clear()

    def _allows(self, weight: Tensor) -> bool:
        known = self._optimizer.knows(weight) and weight.numel() > BLOCK
        if not known or is_quantised(weight) or not weight.is_contiguous():
            return False
        ((_, composition, _),) = self._optimizer.plan([weight])
        if composition.activity is not None or composition.idle is not None:
            return False  # what updates it changes in the course of training
        parts = composition.parts_for(self._optimizer.layout_of(weight))
        return parts.elementwise and not weight.is_complex()

    @torch.no_grad()
    def update(self, weight: Tensor, rows: Callable[[int, int], Tensor]) -> None:
        """Update a weight from `rows(start, stop)`, which makes those rows of its gradient."""
        optimizer = self._optimizer
        ((group, composition, _),) = optimizer.plan([weight])
        parts = composition.parts_for(optimizer.layout_of(weight))
        optimizer.check_home(weight)
        bucket = bucket_of(optimizer, weight, group, parts, gradient=weight)
        work = Workspace()
        for number, (start, stop) in enumerate(_blocks(*weight.shape)):
            gradient = rows(start, stop)
            span = start * weight.shape[1], stop * weight.shape[1]
            part = piece(bucket, number, *span, gradient=gradient)
            if group["nonfinite"] == "raise":
                check_bucket(part, gradient)
            if not update_elementwise(part, group, parts):
                optimizer.update_bucket(weight, part, parts, work)
        keep_numbers(bucket, part)
        self._done.append(weight)


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about BLOCK entries, a multiple of 512 rows so that scales stay whole."""
    length = max(1, BLOCK // columns // 512) * 512
    for start in range(0, rows, length):
        yield start, min(start + length, rows)


def _ordinary(weight: Tensor) -> bool:
    """Whether the layer's own forward pass is wanted: nothing to update, or autocast."""
    plain = not torch.is_grad_enabled() or not weight.requires_grad
    return plain or torch.is_autocast_enabled(weight.device.type)


def _linear(module: nn.Linear, update: Update, x: Tensor) -> Tensor:
    if _ordinary(module.weight):
        return functional.linear(x, module.weight, module.bias)
    result: Tensor = _Linear.apply(x, module.weight, module.bias, update)
    return result


def _embedding(module: nn.Embedding, update: Update, index: Tensor) -> Tensor:
    if _ordinary(module.weight):
        return functional.embedding(index, module.weight, module.padding_idx)
    result: Tensor = _Embedding.apply(index, module.weight, module.padding_idx, update)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.update, ctx.has_bias = update, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None  # before the weight moves
        outer, inner = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        bias = outer.sum(0) if ctx.has_bias else None
        ctx.update(weight, lambda start, stop: outer[:, start:stop].mT @ inner)
        return grad_x, None, bias, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, index: Tensor, weight: Tensor, padding_idx: int | None, update: Update
    ) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.update, ctx.padding_idx = update, padding_idx
        return functional.embedding(index, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        index, weight = ctx.saved_tensors
        flat, values = index.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if ctx.padding_idx is not None:
            used = flat != ctx.padding_idx
            flat, values = flat[used], values[used]

        def rows(start: int, stop: int) -> Tensor:
            chosen = (flat >= start) & (flat < stop)
            block = values.new_zeros(stop - start, values.shape[1])
            return block.index_add_(0, flat[chosen] - start, values[chosen])

        ctx.update(weight, rows)
        return None, None, None, None
