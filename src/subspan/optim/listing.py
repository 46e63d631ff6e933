"""What an optimizer holds: bytes by kind, and a table of its parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subspan.optim.bucket import is_quantised

if TYPE_CHECKING:
    from subspan.optim.composition import Composition
    from subspan.optim.engine import SubspaceOptimizer
    from subspan.subspaces.layout import Layout


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


def declared_bytes(
    optimizer: SubspaceOptimizer, parameter: Tensor, active: bool | None = None
) -> dict[str, int]:
    """Bytes by kind that a parameter's state takes once it has had a gradient.

    Known before the first step.

    Args:
        optimizer: whose parameter it is.
        parameter: the tensor.
        active: in a period in which it is active, or is not; None: now.
    """
    if active is None:
        layout, parts = optimizer.layout_of(parameter), optimizer.parts_of(parameter)
    else:
        layout, parts = (
            optimizer.layout_in(parameter, active),
            optimizer.parts_in(parameter, active),
        )
    here = optimizer.sharding is None or optimizer.sharding.is_mine(parameter)
    return slot_bytes(parts, layout, parameter.dtype) if parts and here else {}


def slot_bytes(parts: Composition, layout: Layout, parameter: torch.dtype) -> dict[str, int]:
    """Bytes by kind of the state that parts declare for a parameter of a layout and dtype."""
    sizes: dict[str, int] = {}
    for kind, (shape, dtype) in parts.slots(layout, parameter).values():
        sizes[kind] = sizes.get(kind, 0) + math.prod(shape) * dtype.itemsize
    return sizes


def active_in(optimizer: SubspaceOptimizer, period: int) -> dict[Tensor, bool]:
    """Which parameters are active in a period, 0-based; all of a group without an activity."""
    found: dict[Tensor, bool] = {}
    for position, group in enumerate(optimizer.param_groups):
        activity = optimizer.composition(position).activity
        found.update(dict.fromkeys(group["params"], True))
        if activity is not None:
            everyone = optimizer.projected(group)
            layouts = [optimizer.layout_in(parameter, True) for parameter in everyone]
            chosen = activity.active(period, layouts)
            found.update((p, place in chosen) for place, p in enumerate(everyone))
    return found


def fullest_period(optimizer: SubspaceOptimizer, periods: int = 64) -> int:
    """Which of the first periods has the most state; 0 without an activity.

    Of equals the one that trains the earliest parameters, behind which all activations are kept.
    """
    groups = range(len(optimizer.param_groups))
    if all(optimizer.composition(position).activity is None for position in groups):
        return 0
    everyone = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = {
        (p, active): sum(declared_bytes(optimizer, p, active).values())
        for p in everyone
        for active in (True, False)
    }

    def rank(period: int) -> tuple[int, int]:
        turn = active_in(optimizer, period)
        first = next((i for i, p in enumerate(turn) if optimizer.parts_in(p, turn[p])), 0)
        return sum(map(sizes.__getitem__, turn.items())), -first

    return max(range(periods), key=rank)


def memory(optimizer: SubspaceOptimizer) -> dict[str, int]:
    """Bytes that training holds, activations aside: known before the first step, also on "meta".

    "weights", the state by kind, "largest_gradient" (what is live at most when every update happens
    in the backward pass), "all_gradients" (otherwise), and "total" with the former. The state of a
    method whose parameters take turns is that of the first period.
    """
    weights = gradients = largest = 0
    state: dict[str, int] = {}
    for parameter, active in active_in(optimizer, 0).items():
        weight = optimizer.weight_of(parameter)
        weights += weight_bytes(weight)
        # Sharded parameters that rest have gradients all the same.
        rests = optimizer.sharding is None and optimizer.parts_in(parameter, active) is None
        gradient = 0 if rests else weight.numel() * parameter.dtype.itemsize
        gradients, largest = gradients + gradient, max(largest, gradient)
        for kind, size in declared_bytes(optimizer, parameter, active).items():
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
