"""What an optimizer holds: bytes by kind, and a table of its parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from subspan.optim.bucket import is_quantised

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer


def state_bytes(optimizer: SubspaceOptimizer) -> dict[str, int]:
    """Bytes of all state tensors by kind, and their "total".

    Step counts and seeds are numbers, not tensors.
    """
    sizes: dict[str, int] = {}
    for parameter, state in optimizer.state.items():
        layout, parts = optimizer.layout_of(parameter), optimizer.parts_of(parameter)
        slots = parts.slots(layout, parameter.dtype) if parts else {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                size = value.numel() * value.element_size()
                kind = slots[name][0]
                sizes[kind] = sizes.get(kind, 0) + size
    return {**sizes, "total": sum(sizes.values())}


def declared_bytes(optimizer: SubspaceOptimizer, parameter: Tensor) -> dict[str, int]:
    """Bytes by kind that a parameter's state takes once it has had a gradient.

    Known before the first step.
    """
    layout, parts = optimizer.layout_of(parameter), optimizer.parts_of(parameter)
    sizes: dict[str, int] = {}
    here = optimizer.sharding is None or optimizer.sharding.is_mine(parameter)
    slots = parts.slots(layout, parameter.dtype) if parts and here else {}
    for kind, (shape, dtype) in slots.values():
        sizes[kind] = sizes.get(kind, 0) + math.prod(shape) * dtype.itemsize
    return sizes


def memory(optimizer: SubspaceOptimizer) -> dict[str, int]:
    """Bytes that training holds, activations aside: known before the first step, also on "meta".

    "weights", the state by kind, "largest_gradient" (what is live at most when every update happens
    in the backward pass), "all_gradients" (otherwise), and "total" with the former.
    """
    weights = gradients = largest = 0
    state: dict[str, int] = {}
    for parameter in (member for group in optimizer.param_groups for member in group["params"]):
        weight = optimizer.weight_of(parameter)
        weights += weight_bytes(weight)
        gradient = weight.numel() * parameter.dtype.itemsize
        gradients, largest = gradients + gradient, max(largest, gradient)
        for kind, size in declared_bytes(optimizer, parameter).items():
            state[kind] = state.get(kind, 0) + size
    return {
        "weights": weights,
        **state,
        "largest_gradient": largest,
        "all_gradients": gradients,
        "total": weights + sum(state.values()) + largest,
    }


def weight_bytes(parameter: Tensor) -> int:
    """Bytes of a weight; of one held in few bits, of its codes, scales and zeros."""
    if not is_quantised(parameter):
        return parameter.numel() * parameter.element_size()
    held = (getattr(parameter, name) for name in ("codes", "scale", "zero"))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def summary(optimizer: SubspaceOptimizer) -> str:
    """One row per parameter: name, shape, side, rank and declared state bytes; and the total.

    Parameters that activity makes idle for a period ("block") keep no state meanwhile.
    """
    rows = [("parameter", "shape", "side", "rank", "state bytes")]
    total = 0
    for parameter in (member for group in optimizer.param_groups for member in group["params"]):
        layout = optimizer.layout_of(parameter)
        size = sum(declared_bytes(optimizer, parameter).values())
        total += size
        shape = "x".join(map(str, layout.natural)) or "scalar"
        side = layout.side or ("block" if layout.projected else "-")
        rows.append((layout.name, shape, side, str(layout.rank or "-"), f"{size:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
