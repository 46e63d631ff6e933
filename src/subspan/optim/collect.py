"""Which parameters form which bucket in a step, and the state they need for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim.bucket import Bucket, pieces
from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.subspaces.layout import Layout

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer

# Entries of an elementwise tensor treated at once where temporaries are needed: cache-sized on the
# CPU, few kernels elsewhere.
PIECE = {"cpu": 1 << 16, "other": 1 << 22}
# Matrices of at least so many entries are not batched on the CPU.
SMALL = 1 << 16

State = dict[str, Any]


def gradients_are_usable(optimizer: SubspaceOptimizer, compositions: Sequence[Composition]) -> bool:
    """Check gradients before anything changes; False means that the step is to be skipped.

    Left out are those that `checked_in_bucket` names: a pass over them would cost about a tenth of
    a step on the CPU.

    Raises:
        FloatingPointError: a gradient is not finite and its group says "raise".
        RuntimeError: a gradient is sparse.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    checked: list[tuple[Tensor, Tensor, str]] = []
    for group, parts in zip(optimizer.param_groups, compositions, strict=True):
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            layout = optimizer.layout_of(parameter)
            if gradient.is_sparse:
                raise RuntimeError(
                    f"parameter {layout.name!r} has a sparse gradient: use sparse=False in its "
                    "embedding, or torch.optim.SparseAdam for it"
                )
            late = layout.projected and checked_in_bucket(group, parts, parameter.device)
            if group["nonfinite"] != "ignore" and not late:
                sums.setdefault(gradient.device, []).append(_sum(gradient).abs().float())
                checked.append((parameter, gradient, group["nonfinite"]))
    if all(bool(torch.stack(values).isfinite().all()) for values in sums.values()):
        return True
    bad = [(p, policy) for p, gradient, policy in checked if not gradient.isfinite().all()]
    for parameter, policy in bad:
        if policy == "raise":
            raise bad_gradient(optimizer.layout_of(parameter).name)
    return not bad


def checked_in_bucket(group: State, parts: Composition, device: torch.device) -> bool:
    """Whether projected gradients are checked one bucket at a time, by their coordinates.

    Where that would wait for a device, one check for all of them is better.
    """
    return group["nonfinite"] == "raise" and parts.shows_bad_gradients and device.type == "cpu"


def check_bucket(bucket: Bucket, gathered: Tensor) -> None:
    """Refuse a bucket whose gradients, or their coordinates, are not finite.

    Raises:
        FloatingPointError: naming the parameter; the bucket has not changed.
    """
    if math.isfinite(_sum(gathered).item()):
        return
    for gradient, layout in zip(bucket.gradients, bucket.layouts, strict=True):
        if not gradient.isfinite().all():
            raise bad_gradient(layout.name)


def bad_gradient(name: str) -> FloatingPointError:
    """The error for a parameter whose gradient is not finite."""
    return FloatingPointError(
        f"the gradient of parameter {name!r} holds NaN or infinity, and the parameter was not "
        "changed. Lower the learning rate, clip gradients, or pass nonfinite='skip'"
    )


def _sum(gradient: Tensor) -> Tensor:
    """A sum is finite unless an entry is not; float16 could overflow, so it is widened."""
    return gradient.sum(dtype=torch.float32 if gradient.dtype == torch.float16 else None)


def plain_buckets(
    optimizer: SubspaceOptimizer, group: State, composition: Composition
) -> Iterator[tuple[Bucket, Composition]]:
    """Buckets of a group's unprojected parameters, with the parts that update them.

    Those that a fused kernel can update as they are, all at once, are updated here.
    """
    fused: dict[tuple[Any, ...], list[Bucket]] = {}
    for parameter in group["params"]:
        layout = optimizer.layout_of(parameter)
        if parameter.grad is None or layout.projected:
            continue
        parts = composition.parts_for(layout)
        state = state_of(optimizer, parameter, parts, group)
        step = state["step"] + 1
        bucket = Bucket([_real(parameter)], [_real(parameter.grad)], [state], [layout], step, step)
        if not parts.elementwise:
            yield bucket, parts
        elif isinstance(parts.inner, Adam) and _is_native(bucket):
            key = (parts.inner, bucket.dtype, bucket.device, step)
            fused.setdefault(key, []).append(bucket)
        else:
            for piece in pieces(bucket, PIECE.get(bucket.device.type, PIECE["other"])):
                yield piece, parts
            state["step"] = step
    for (inner, _, _, step), buckets in fused.items():
        weights, gradients, states = (
            [getattr(bucket, name)[0] for bucket in buckets]
            for name in ("weights", "gradients", "states")
        )
        inner.step_weights(
            weights, gradients, states, step, float(group["lr"]), group["weight_decay"]
        )
        for state in states:
            state["step"] = step


def projected_buckets(
    optimizer: SubspaceOptimizer,
    parameters: list[Tensor],
    group: State,
    parts: Composition,
    largest: int,
) -> Iterator[Bucket]:
    """Equal parameters in batches that together are no larger than the largest parameter.

    On the CPU a large matrix gains nothing from a batch, which would only copy it.
    """
    alike: dict[tuple[Any, ...], list[tuple[Tensor, Layout, State]]] = {}
    projected = optimizer.projected(group) if parts.finder is not None else []
    positions = {parameter: position for position, parameter in enumerate(projected)}
    for parameter in parameters:
        layout = optimizer.layout_of(parameter)
        state = state_of(optimizer, parameter, parts, group)
        gradient = parameter.grad
        assert gradient is not None
        step = state["step"] + 1
        age = step - state.get("restarted", 0)
        due = blank = False
        if parts.finder is not None:
            planned = parts.refresh.scheduled(step, positions[parameter], len(projected))
            due = state["refreshed"] < planned
            # A zero gradient carries no subspace: the old one stays, the next step looks again.
            blank = due and parts.finder.reads_gradient and not bool(gradient.any())
        shape = (layout.view, layout.side, layout.rank)
        kind = (parameter.dtype, parameter.device, gradient.dtype)
        found = state.get("refreshed", 1) > 0
        alike.setdefault((shape, kind, step, age, due, blank, found), []).append(
            (parameter, layout, state)
        )
    for (_, (_, device, _), step, age, due, blank, _), members in alike.items():
        size = members[0][1].natural_size
        large = device.type == "cpu" and size >= SMALL
        length = 1 if large else max(1, largest // size)
        for start in range(0, len(members), length):
            weights, layouts, states = zip(*members[start : start + length], strict=True)
            gradients = [weight.grad for weight in weights]
            yield Bucket(
                list(weights), gradients, list(states), list(layouts), step, age, due, blank
            )


def split_by_activity(
    optimizer: SubspaceOptimizer, group: State, parts: Composition
) -> tuple[list[Tensor], list[Tensor]]:
    """A group's projected parameters that have a gradient, as active and idle ones."""
    everyone = optimizer.projected(group)
    ready = [parameter for parameter in everyone if parameter.grad is not None]
    if parts.activity is None or not ready:
        return ready, []
    steps = [optimizer.state[p].get("step", 0) for p in everyone if p in optimizer.state]
    period = max(steps, default=0) // parts.activity.gap
    chosen = parts.activity.active(period, len(everyone))
    active: list[Tensor] = []
    idle: list[Tensor] = []
    fresh: list[Tensor] = []
    for position, parameter in enumerate(everyone):
        if parameter.grad is None:
            continue
        (active if position in chosen else idle).append(parameter)
        state = optimizer.state[parameter]
        if state.get("period") != period:
            # Only active tensors keep moments, and they start afresh with every period.
            step = state.get("step", 0)
            state.clear()
            state.update(step=step, restarted=step, period=period)
            fresh += [parameter] if position in chosen else []
    # Allocated only after the old moments are gone, so that a change of period costs no memory.
    for parameter in fresh:
        layout = optimizer.layout_of(parameter)
        _allocate(layout, parameter, parts, optimizer.state[parameter])
    return active, idle


def state_of(
    optimizer: SubspaceOptimizer, parameter: Tensor, parts: Composition, group: State
) -> State:
    """A parameter's state, allocated as its parts declare it on first use."""
    state: State = optimizer.state[parameter]
    if "step" not in state:
        layout = optimizer.layout_of(parameter)
        state["step"] = 0
        if parts.finder is not None:
            state["refreshed"] = 0
            if parts.transport.restarts:
                state["restarted"] = 0
            if parts.finder.draws_from_seed:
                state["seed"] = group["seed"] + layout.index + 1
        _allocate(layout, parameter, parts, state)
    return state


def _allocate(layout: Layout, parameter: Tensor, parts: Composition, state: State) -> None:
    for declared in parts.declarations(layout):
        shape = layout.shape(declared.shape)
        dtype = parts.storage.dtype(declared, parameter.dtype)
        if shape == layout.natural and not parameter.is_complex():
            tensor = torch.zeros_like(parameter, dtype=dtype)
        else:
            tensor = torch.zeros(shape, dtype=dtype, device=parameter.device)
        if declared.fill == "parameter":
            tensor.copy_(_real(parameter))
        elif declared.fill:
            tensor.fill_(declared.fill)
        state[declared.name] = tensor


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _is_native(bucket: Bucket) -> bool:
    """Whether weight, gradient and moments are alike in full precision, as a fused kernel needs."""
    tensors = [bucket.weights[0], bucket.gradients[0]]
    tensors += [value for value in bucket.states[0].values() if isinstance(value, Tensor)]
    strides = tensors[0].stride()
    return all(t.dtype == bucket.dtype and t.stride() == strides for t in tensors)
