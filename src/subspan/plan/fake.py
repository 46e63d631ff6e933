"""Models whose tensors have shapes but no memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subspan.layers import QuantisedWeight


class _Codes(QuantisedWeight):
    """A quantised weight whose dequantised copy is allocated, but not computed piece by piece."""

    def dequantise(self, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype) if out is None else out

    def _with_parts(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> QuantisedWeight:
        parts = (change(part) for part in held_tensors(self))
        return _Codes(*parts, group=self.group, bits=self.bits, dtype=dtype or self.dtype)


def held_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of."""
    if isinstance(tensor, QuantisedWeight):
        return [tensor.codes, tensor.scale, tensor.zero]
    return [tensor]


def make_fake(model: nn.Module) -> None:
    """Exchange all tensors of a model for fake ones on the CPU; to be called in a fake mode."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _fake(tensor)
        return made[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in held:
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    tensors[name] = fake(value)


def _fake(tensor: Tensor) -> Tensor:
    if isinstance(tensor, QuantisedWeight):
        parts = (torch.empty(part.shape, dtype=part.dtype) for part in held_tensors(tensor))
        value: Tensor = _Codes(*parts, group=tensor.group, bits=tensor.bits, dtype=tensor.dtype)
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, tensor.requires_grad)
    return value


@contextmanager
def no_log(name: str) -> Iterator[None]:
    """Operators that fail on fake tensors raise, too; that is enough."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def no_packing() -> Iterator[None]:
    """Let transformers know that sequences are not packed, which it would read from values."""
    try:
        from transformers import masking_utils
    except ImportError:
        yield
        return
    name = "find_packed_sequence_indices"
    own = getattr(masking_utils, name, None)
    if own is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if own is not None:
            setattr(masking_utils, name, own)
