"""Scratch memory of one optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Buffers that are reused from bucket to bucket within one step and freed with the step.

    An allocation per matrix would cost a page fault per 4 KiB on the CPU in every step; keeping the
    buffers between steps would be hidden memory. `take` hands out uninitialised tensors, `release`
    makes all of them available again.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._taken: dict[tuple[torch.dtype, torch.device], int] = {}

    def release(self) -> None:
        """Give back everything that was taken; earlier tensors must not be used any more."""
        self._taken.clear()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor, valid until `release`."""
        key = (dtype, device)
        buffers = self._buffers.setdefault(key, [])
        position = self._taken.get(key, 0)
        self._taken[key] = position + 1
        size = math.prod(shape)
        if position == len(buffers):
            buffers.append(torch.empty(size, dtype=dtype, device=device))
        elif buffers[position].numel() < size:
            buffers[position] = buffers[position].new_empty(0)  # free it before allocating anew
            buffers[position] = torch.empty(size, dtype=dtype, device=device)
        return buffers[position][:size].view(shape)

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape, dtype and device."""
        return self.take(tuple(tensor.shape), tensor.dtype, tensor.device)

    def give_back(self, tensor: Tensor) -> None:
        """Make the tensor that was taken last available again."""
        self._taken[(tensor.dtype, tensor.device)] -= 1

    def trim(self) -> None:
        """Free the buffers that are not taken, for work that needs much memory of its own."""
        for key, buffers in self._buffers.items():
            del buffers[self._taken.get(key, 0) :]
