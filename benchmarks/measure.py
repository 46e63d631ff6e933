"""Clocks, byte counts and memory peaks. Nothing here knows an optimizer by name."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_OPAQUE = (str, bytes, int, float, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


@dataclass(frozen=True)
class Elapsed:
    """Seconds of one call: CPU time of the process, and wall clock."""

    cpu: float
    wall: float


def timed(call: Callable[[], object]) -> Elapsed:
    """Run `call` once and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Elapsed(time.process_time() - cpu, time.perf_counter() - wall)


def tensors_in(root: object) -> Iterator[Tensor]:
    """Every plain tensor reachable from `root` by containers, attributes and slots, once each.

    Of tensor subclasses that wrap others (codes and scales), those others.
    """
    seen: set[int] = set()
    # A strong reference to everything visited keeps ids from being reused during the walk.
    stack, visited = [root], []
    while stack:
        item = stack.pop()
        if item is None or isinstance(item, _OPAQUE) or id(item) in seen:
            continue
        seen.add(id(item))
        visited.append(item)
        if isinstance(item, Tensor) and is_traceable_wrapper_subclass(item):
            # It has the shape of what it stands for, and the bytes of what it is made of.
            stack.extend(getattr(item, name) for name in item.__tensor_flatten__()[0])
        elif isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        else:
            stack.extend(getattr(item, "__dict__", {}).values())
            slots = [s for cls in type(item).__mro__ for s in getattr(cls, "__slots__", ())]
            stack.extend(getattr(item, slot, None) for slot in slots)


@dataclass(frozen=True)
class Bytes:
    """`logical`: elements times item size. `retained`: whole storages that these keep alive."""

    logical: int
    retained: int


def count_bytes(root: object, exclude: list[Tensor]) -> Bytes:
    """Bytes of the tensors reachable from `root`, without the storages of `exclude`."""
    skipped = {tensor.untyped_storage()._cdata for tensor in tensors_in(exclude)}
    logical, storages = 0, {}
    for tensor in tensors_in(root):
        storage = tensor.untyped_storage()
        if storage._cdata in skipped:
            continue
        logical += tensor.numel() * tensor.element_size()
        storages[storage._cdata] = storage.nbytes()
    return Bytes(logical, sum(storages.values()))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> tuple[Bytes, Bytes]:
    """(state, everything that the optimizer object keeps alive between steps)."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    own += [p.grad for p in own if p.grad is not None]
    # Keys of `state` are the parameters themselves, hence the exclusion for the state as well.
    return count_bytes(optimizer.state, own), count_bytes(vars(optimizer), own)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def release_memory() -> None:
    """Hand freed heap pages back to the kernel, so that a step has to fault in what it uses."""
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _without_native_stderr() -> Iterator[None]:
    """The profiler's native code prints a line at each start and stop."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_allocated(call: Callable[[], object]) -> int:
    """Exact high-water mark of what torch's CPU allocator hands out during one call.

    Counts allocations inside native kernels too, but not what a maths library allocates itself.
    What the call leaves allocated is state that has grown, not a temporary, and is taken off.
    """
    with _without_native_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            call()
        recorded = prof.profiler.kineto_results.events()
        events = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    live = peak = 0
    for _, change in events:
        live += change
        peak = max(peak, live)
    return peak - max(0, live)


def peak_resident(call: Callable[[], object]) -> int | None:
    """The kernel's resident high-water mark during one call, above what was resident before it.

    None where the kernel does not let a process reset the mark (it does on Linux).
    """
    release_memory()
    try:
        before = _status_bytes("VmRSS")
        _CLEAR_REFS.write_text("5")
    except OSError:
        call()
        return None
    call()
    return max(0, _status_bytes("VmHWM") - before)
