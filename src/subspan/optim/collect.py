"""Which parameters form which bucket in a step, and the state they need for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim.bucket import Bucket, is_quantised, keep_numbers, pieces
from subspan.optim.composition import Composition
from subspan.optim.parts.activity import Activity
from subspan.optim.sharding import Standin
from subspan.subspaces.layout import Layout

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer

# Entries of an elementwise tensor treated at once where temporaries are needed: a megabyte each on
# the CPU, where a call costs more than a miss of the inner caches; few kernels elsewhere.
PIECE = {"cpu": 1 << 18, "other": 1 << 22}
# Matrices of at least so many entries are not batched on the CPU.
SMALL = 1 << 16

State = dict[str, Any]


def gradients_are_usable(
    optimizer: SubspaceOptimizer, work: Sequence[tuple[State, Composition, Sequence[Tensor]]]
) -> bool:
    """Check gradients before anything changes; False means that the step is to be skipped.

    Left out are those that `checked_in_bucket` names, a pass over which would cost a tenth of a
    step on the CPU; not where a period starts, which drops states before there are buckets.

    Args:
        optimizer: whose parameters they are.
        work: param group, its parts, and those of its parameters that take the step.

    Raises:
        FloatingPointError: a gradient is not finite and its group says "raise".
        RuntimeError: a gradient is sparse, or a parameter has moved to another device or dtype.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    checked: list[tuple[Tensor, Tensor, str]] = []
    for group, parts, parameters in work:
        fresh = parts.activity is not None and _starts_period(parts.activity, group["steps"])
        for parameter in parameters:
            if parameter.grad is None:
                continue
            layout = optimizer.layout_of(parameter)
            if parameter.grad.is_sparse:
                raise RuntimeError(
                    f"parameter {layout.name!r} has a sparse gradient: use sparse=False in its "
                    "embedding, or torch.optim.SparseAdam for it"
                )
            optimizer.check_home(parameter)
            gradient = optimizer.held(parameter).gradient
            # What one rank finds in its piece, all have to know before any of them has changed.
            late = checked_in_bucket(group, parameter.device) and not fresh
            late = late and optimizer.sharding is None
            if group["nonfinite"] != "ignore" and not late:
                sums.setdefault(gradient.device, []).append(_sum(gradient).abs().float())
                checked.append((parameter, gradient, group["nonfinite"]))
    found = [False] * len(checked)
    if not all(bool(torch.stack(values).isfinite().all()) for values in sums.values()):
        # A sum may overflow although every entry is finite.
        found = [not gradient.isfinite().all() for _, gradient, _ in checked]
    if optimizer.sharding is not None:
        found = optimizer.sharding.agree(found, everyone=False)
    bad = [(p, policy) for (p, _, policy), is_bad in zip(checked, found, strict=True) if is_bad]
    for parameter, policy in bad:
        if policy == "raise":
            raise bad_gradient(optimizer.layout_of(parameter).name)
    return not bad


def checked_in_bucket(group: State, device: torch.device) -> bool:
    """Whether gradients are checked one bucket at a time, just before they are used.

    They are in the cache then, or their coordinates or norms show it. Where a check would wait for
    a device, one for all gradients is better.
    """
    return group["nonfinite"] == "raise" and device.type == "cpu"


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
    """A sum is finite unless an entry is not; float16 could overflow, so it is widened.

    The CPU reads two streams faster than one, so the halves of a large one are multiplied.
    """
    half, odd = divmod(gradient.numel(), 2)
    native = gradient.dtype in (torch.float32, torch.float64) and gradient.is_contiguous()
    if native and not odd and half >= SMALL and gradient.device.type == "cpu":
        flat = gradient.view(-1)
        return torch.dot(flat[:half], flat[half:])
    return gradient.sum(dtype=torch.float32 if gradient.dtype == torch.float16 else None)


def assignments(
    optimizer: SubspaceOptimizer, group: State, composition: Composition, ready: Sequence[Tensor]
) -> list[tuple[Composition, list[Tensor]]]:
    """Which parts update which of a group's parameters in this step.

    Parameters that rest in this period are left out. At the start of a period all start afresh.

    Args:
        optimizer: whose parameters they are.
        group: the param group.
        composition: its parts.
        ready: those of its parameters that have a gradient.
    """
    if composition.activity is not None:
        start_period(optimizer, group, composition.activity)
    found: dict[int, tuple[Composition, list[Tensor]]] = {}
    for parameter in ready:
        parts = optimizer.parts_of(parameter)
        if parts is not None:
            found.setdefault(id(parts), (parts, []))[1].append(parameter)
    return list(found.values())


def _starts_period(activity: Activity, steps: int) -> bool:
    """Whether the step after `steps` steps is the first of a period."""
    return activity.period(steps) != activity.period(steps - 1)


def start_period(optimizer: SubspaceOptimizer, group: State, activity: Activity) -> None:
    """At the start of a period, draw who is active and drop what everyone kept."""
    everyone = optimizer.projected(group)
    period = activity.period(group["steps"])
    # Parameters that never had a gradient cost nothing, not even a note of the period.
    late = [
        (position, parameter)
        for position, parameter in enumerate(everyone)
        if (parameter.grad is not None or parameter in optimizer.state)
        and optimizer.state[parameter].get("period") != period
    ]
    if not late:
        return
    layouts = [optimizer.layout_of(parameter) for parameter in everyone]
    active, always = activity.active(period, layouts), activity.always(layouts)
    for position, parameter in late:
        state: State = optimizer.state[parameter]
        if position in always and "step" in state:
            state["period"] = period
            continue
        step = state.get("step", state.get("kept_step", 0))
        state.clear()
        state.update(period=period, active=int(position in active), kept_step=step)


def buckets(
    optimizer: SubspaceOptimizer,
    parameters: Sequence[Tensor],
    group: State,
    parts: Composition,
    largest: int,
) -> Iterator[Bucket]:
    """The buckets of the parameters that these parts update.

    Those that a fused kernel can update as they are, all at once, are updated here.

    Args:
        optimizer: whose parameters they are.
        parameters: some of a param group's, all with a gradient.
        group: that param group.
        parts: what updates them.
        largest: entries of the largest parameter, which no batch exceeds.
    """
    alike: dict[tuple[Any, ...], list[Bucket]] = {}
    fused: dict[tuple[Any, ...], list[Bucket]] = {}
    for parameter in parameters:
        bucket = bucket_of(optimizer, parameter, group, parts)
        layout, state = bucket.layout, bucket.states[0]
        if parts.elementwise:
            if parts.inner.can_step_weights(bucket.age) and _is_native(bucket):
                key = (bucket.dtype, bucket.device, bucket.step, bucket.age)
                fused.setdefault(key, []).append(bucket)
            else:
                if checked_in_bucket(group, bucket.device):
                    check_bucket(bucket, bucket.gradients[0])
                length = PIECE.get(bucket.device.type, PIECE["other"])
                cut = pieces(bucket, length)
                yield from cut
                keep_numbers(bucket, cut[-1])
            continue
        shape = (layout.view, layout.whole, layout.side, layout.rank, layout.mode_ranks)
        kind = (parameter.dtype, parameter.device, bucket.gradients[0].dtype)
        history = (bucket.step, bucket.age, bucket.due, bucket.blank)
        found = state.get("refreshed", 1) > 0
        alike.setdefault((shape, kind, history, found), []).append(bucket)
    for (_, device, step, age), members in fused.items():
        if not checked_in_bucket(group, device):
            _update_fused(members, group, parts, step, age)
            continue
        for bucket in members:
            check_bucket(bucket, bucket.gradients[0])
            _update_fused([bucket], group, parts, step, age)
    for members in alike.values():
        yield from _batches(members, largest)


def refresh_is_due(
    optimizer: SubspaceOptimizer, parameter: Tensor, parts: Composition, state: State
) -> bool:
    """Whether a refresh is planned for the coming step."""
    position, count = optimizer.place_of(parameter)
    planned = parts.refresh.scheduled(state["step"] + 1, position, count, state)
    return bool(state["refreshed"] < planned)


def bucket_of(
    optimizer: SubspaceOptimizer,
    parameter: Tensor,
    group: State,
    parts: Composition,
    gradient: Tensor | None = None,
) -> Bucket:
    """The bucket of one parameter, for its gradient or the one that is given."""
    layout = optimizer.layout_of(parameter)
    state = state_of(optimizer, parameter, parts, group)
    held = optimizer.held(parameter) if gradient is None else Standin(parameter, gradient)
    step = state["step"] + 1
    due = blank = False
    if parts.finder is not None:
        due = refresh_is_due(optimizer, parameter, parts, state)
        # A zero gradient carries no subspace: the old one stays, the next step looks again.
        blank = due and parts.finder.reads_gradient
        blank = blank and (_is_zero(held.gradient) if held.blank is None else held.blank)
    age = step - state.get("restarted", 0)
    return Bucket(
        [real(held.weight)],
        [real(held.gradient)],
        [state],
        [layout],
        step,
        age,
        due,
        blank,
        parts.codecs(layout),
        found=held.found,
        sharding=optimizer.sharding if layout.whole else None,
    )


def _is_zero(gradient: Tensor) -> bool:
    """Whether all entries are zero; the first row answers for most gradients."""
    some = gradient.numel() > 0 and bool(gradient[0].any())
    return not (some or bool(gradient.any()))


def _batches(members: list[Bucket], largest: int) -> Iterator[Bucket]:
    """Equal parameters in batches that together are no larger than the largest parameter.

    On the CPU a large matrix gains nothing from a batch, which would only copy it.
    """
    first = members[0]
    size = first.layout.natural_size
    whole = first.device.type == "cpu" and size >= SMALL
    # Pieces differ in size between ranks, which must sum the same things in the same order.
    single = whole or not first.layout.is_matrix or first.sharding is not None
    length = 1 if single else max(1, largest // max(1, size))
    for start in range(0, len(members), length):
        yield Bucket.joined(members[start : start + length])


def _update_fused(
    members: list[Bucket], group: State, parts: Composition, step: int, age: int
) -> None:
    inner = parts.inner
    weights, gradients, states = (
        [getattr(bucket, name)[0] for bucket in members]
        for name in ("weights", "gradients", "states")
    )
    lr, decay = float(group["lr"]), group["weight_decay"]
    inner.step_weights(weights, gradients, states, age, lr, decay, lr * parts.lr_scale)
    for state in states:
        state["step"] = step


def update_elementwise(bucket: Bucket, group: State, parts: Composition) -> bool:
    """Update a bucket with the fused kernel if that can be done; False if it cannot."""
    if not parts.inner.can_step_weights(bucket.age) or not _is_native(bucket):
        return False
    _update_fused([bucket], group, parts, bucket.step, bucket.age)
    return True


def state_of(
    optimizer: SubspaceOptimizer, parameter: Tensor, parts: Composition, group: State
) -> State:
    """A parameter's state, allocated as its parts declare it on first use."""
    state: State = optimizer.state[parameter]
    if "step" not in state:
        layout = optimizer.layout_of(parameter)
        state["step"] = state.pop("kept_step", 0)
        if "period" in state or parts.transport.restarts:
            state["restarted"] = state["step"]
        if parts.finder is not None:
            state["refreshed"] = 0
            if parts.finder.draws_from_seed:
                state["seed"] = group["seed"] + layout.index + 1
            state.update(parts.refresh.counters())
        state.update(parts.inner.counters(layout))
        allocate(layout, optimizer.weight_of(parameter), parts, state)
    return state


def allocate(layout: Layout, parameter: Tensor, parts: Composition, state: State) -> None:
    """Add the tensors that the parts declare to a parameter's state."""
    codecs = parts.codecs(layout)
    for declared in parts.declarations(layout):
        slots = parts.storage.slots(declared, layout, parameter.dtype)
        for name, (shape, dtype) in slots.items():
            if (
                shape == layout.natural
                and not parameter.is_complex()
                and not is_quantised(parameter)
            ):
                tensor = torch.zeros_like(parameter, dtype=dtype)
            else:
                tensor = torch.zeros(shape, dtype=dtype, device=parameter.device)
            state[name] = tensor
        if declared.name in codecs:
            if declared.fill:
                codec, shape = codecs[declared.name][0], layout.shape(declared.shape)
                value = torch.empty(shape, device=parameter.device)
                _fill(value, declared.fill, parameter)
                suffixes = {name.removeprefix(declared.name): state[name] for name in slots}
                codec.encode(value, suffixes)
        else:
            _fill(state[declared.name], declared.fill, parameter)


def _fill(tensor: Tensor, fill: float | str, parameter: Tensor) -> None:
    if fill == "parameter":
        tensor.copy_(real(parameter))
    elif fill:
        tensor.fill_(fill)  # type: ignore[arg-type]


def real(tensor: Tensor) -> Tensor:
    """Complex tensors as pairs of real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _is_native(bucket: Bucket) -> bool:
    """Whether weight, gradient and moments are alike in full precision, as a fused kernel needs."""
    if bucket.codecs or is_quantised(bucket.weights[0]):
        return False
    tensors = [bucket.weights[0], bucket.gradients[0]]
    states = bucket.states[0].values()
    # States without dimensions are sums over the weight, which a kernel only adds to.
    tensors += [value for value in states if isinstance(value, Tensor) and value.dim()]
    strides = tensors[0].stride()
    return all(t.dtype == bucket.dtype and t.stride() == strides for t in tensors)
