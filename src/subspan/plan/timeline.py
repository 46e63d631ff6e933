"""What is allocated at every moment of a pass that runs on fake tensors.

Fake tensors have shapes, dtypes and devices but no memory, so a forward and backward pass of a
model of any size takes a moment. A dispatch mode sees every tensor that an operator returns, and a
finaliser when its storage is freed: what PyTorch's allocator would hold, operator by operator.
Memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a stretch of time, in bytes.

    Args:
        total: activations and gradients.
        gradients: those of them that are finished gradients of parameters.
    """

    total: int = 0
    gradients: int = 0


@dataclass
class Window:
    """The fullest moments of a stretch of time, by what happens to a finished gradient.

    Args:
        kept: gradients stay until the step.
        freed: a gradient is freed as soon as it is there.
        arrivals: the most bytes when a gradient of some shape has arrived, if they are freed.
    """

    kept: Moment = Moment()
    freed: Moment = Moment()
    arrivals: dict[tuple[int, ...], int] = field(default_factory=dict)


class Timeline(TorchDispatchMode):
    """Watches storages that come into being inside the context.

    Questions that the program asks about values (`.item()`, `if tensor:`) are answered with 1 or
    True, since there are none.

    Args:
        existing: tensors that are there before; views of them are no allocation.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = self.arrived_bytes = 0
        self.windows = [Window()]
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.alive += size
        self._note()

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def _note(self) -> None:
        window = self.windows[-1]
        if self.alive > window.freed.total:
            window.freed = Moment(self.alive)
        kept = self.alive + self.arrived_bytes
        if kept > window.kept.total:
            window.kept = Moment(kept, self.arrived_bytes)

    def arrived(self, gradient: Tensor) -> None:
        """A gradient is finished; the caller frees it now."""
        arrivals, shape = self.windows[-1].arrivals, tuple(gradient.shape)
        arrivals[shape] = max(arrivals.get(shape, 0), self.alive)
        self.arrived_bytes += gradient.untyped_storage().nbytes()

    def enter(self) -> None:
        """Begin the next stretch of time."""
        self.windows.append(Window())
        self._note()
