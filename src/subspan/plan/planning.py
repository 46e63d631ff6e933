"""The memory plan of one way of training."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from subspan.optim.backward import check_attachable
from subspan.optim.rowwise import RowwiseUpdates
from subspan.plan.activations import Passes, run_passes
from subspan.plan.configs import quietly
from subspan.plan.model import BuiltModel, meta_model
from subspan.plan.parts import Parts, parts_of
from subspan.plan.result import Peak, Plan
from subspan.plan.settings import Settings
from subspan.plan.sharding import shares
from subspan.train.errors import JobError, one_line


def make_plan(settings: Settings, period: int | None = None) -> Plan:
    """Plan one way of training.

    Args:
        settings: model, method and way of training.
        period: see `subspan.plan.parts.parts_of`.

    Raises:
        JobError: the model cannot be built, or the method cannot train it so.
    """
    built = meta_model(settings.model)
    parts = _cached_parts(built, settings.method, _Options(settings.options), period)
    check_backward(settings, parts)
    passes, reason = _activations(settings, built, parts)
    notes = [] if reason is None else [f"activations are not known: {reason}"]
    notes += _notes(settings, parts, passes)
    if settings.ranks > 1:
        return _sharded(settings, built, parts, passes, notes)
    return _whole(settings, built, parts, passes, notes)


class _Options(dict[str, Any]):
    """Options of a method as a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@lru_cache(maxsize=16)
def _cached_parts(built: BuiltModel, method: str, options: _Options, period: int | None) -> Parts:
    return parts_of(built.module, method, options, period)


def check_backward(settings: Settings, parts: Parts) -> None:
    """Refuse what cannot be updated in the backward pass.

    Raises:
        JobError: with the engine's reason.
    """
    if not settings.update_in_backward:
        return
    try:
        limit = settings.clip or None
        check_attachable(parts.optimizer, settings.accumulation, limit, settings.clipping)
    except (ValueError, RuntimeError) as error:
        raise JobError(f"update in backward: {one_line(error)}") from None


def _activations(
    settings: Settings, built: BuiltModel, parts: Parts
) -> tuple[Passes | None, str | None]:
    by_rows: tuple[str, ...] = ()
    if settings.updates_at_once and not settings.clip:
        by_rows = _updated_by_rows(built, parts)
    checkpointing = settings.checkpointing == "full"
    return _cached_passes(built, settings.batch_size, checkpointing, by_rows, parts.resting)


def _updated_by_rows(built: BuiltModel, parts: Parts) -> tuple[str, ...]:
    """Names of the weights whose gradients never exist whole."""
    rows = RowwiseUpdates(parts.optimizer, [])
    rows.attach(built.module)
    chosen = {id(module.weight) for module in rows._modules}
    rows.detach()
    return tuple(name for name, p in built.module.named_parameters() if id(p) in chosen)


@cache
def _cached_passes(
    built: BuiltModel,
    batch_size: int,
    checkpointing: bool,
    by_rows: tuple[str, ...],
    resting: frozenset[str],
) -> tuple[Passes | None, str | None]:
    try:
        with quietly():
            passes = run_passes(
                built.module,
                built.make_inputs,
                batch_size,
                built.spec.sequence_length,
                checkpointing=checkpointing,
                mixed=built.spec.dtype == "bfloat16-mixed",
                by_rows=by_rows,
                resting=resting,
            )
    except Exception as error:  # Whatever a model's own code raises without values.
        return None, f"{type(error).__name__}: {one_line(error)}"
    return passes, None


def _whole(
    settings: Settings, built: BuiltModel, parts: Parts, passes: Passes | None, notes: list[str]
) -> Plan:
    """The plan of one device."""
    device, states = settings.device, dict(parts.states)
    base = parts.weights + parts.buffers + sum(states.values())
    peaks: list[Peak] = []
    if settings.updates_at_once:
        gradients = parts.largest_gradient
        temporary = max(
            (parts.scratch(h, device) for h in parts.parameters if h.gradient), default=0
        )
        if passes is not None:
            peaks.append(_peak_at_once(parts, passes, base, device))
            if not settings.clip:
                gradients = max((_size(parts, shape) for shape in passes.arrivals), default=0)
    else:
        gradients, temporary = parts.gradients, parts.step_scratch(device)
        if passes is not None:
            peaks.append(_peak_kept(settings, parts, passes, base))
            peaks.append(Peak("step", gradients, 0, temporary, base + gradients + temporary))
    return Plan(
        settings,
        built.label,
        built.parameters,
        sum(held.entries for held in parts.parameters if held.gradient),
        parts.weights,
        parts.buffers,
        states,
        gradients,
        passes.saved if passes is not None else None,
        temporary,
        {peak.moment: peak.total for peak in peaks},
        max(peaks, key=lambda peak: peak.total, default=None),
        notes=tuple(notes),
    )


def _size(parts: Parts, shape: tuple[int, ...]) -> int:
    return max((held.gradient for held in parts.parameters if held.shape == shape), default=0)


def _peak_at_once(parts: Parts, passes: Passes, base: int, device: str) -> Peak:
    """Every gradient is used and freed as soon as it is there."""
    best = Peak("backward", 0, passes.freed.total, 0, base + passes.freed.total)
    for held in parts.parameters:
        alive = passes.arrivals.get(held.shape)
        if alive is not None and held.gradient:
            scratch = parts.scratch(held, device)
            if base + alive + scratch > best.total:
                activations = alive - held.gradient
                total = base + alive + scratch
                best = Peak("backward", held.gradient, activations, scratch, total)
    return best


def _peak_kept(settings: Settings, parts: Parts, passes: Passes, base: int) -> Peak:
    """Gradients stay until the step; from the second pass of a step on all of them exist."""
    if settings.accumulation > 1:
        activations = passes.freed.total
        total = base + parts.gradients + activations
        return Peak("backward", parts.gradients, activations, 0, total)
    kept = passes.kept
    activations = kept.total - kept.gradients
    return Peak("backward", kept.gradients, activations, 0, base + kept.total)


def _sharded(
    settings: Settings, built: BuiltModel, parts: Parts, passes: Passes | None, notes: list[str]
) -> Plan:
    """The plan of one of several devices under FSDP2."""
    share = shares(built.module, parts, settings.ranks)
    base = share.weights + parts.buffers + sum(share.states.values())
    temporary = parts.step_scratch(settings.device) + share.visiting
    peaks = []
    if passes is not None:
        passing = passes.freed.total + share.gathered + share.unreduced
        peaks.append(
            Peak("backward", share.gradients, passing, 0, base + share.gradients + passing)
        )
        total = base + share.gradients + temporary
        peaks.append(Peak("step", share.gradients, 0, temporary, total))
    return Plan(
        settings,
        built.label,
        built.parameters,
        sum(held.entries for held in parts.parameters if held.gradient),
        share.weights,
        parts.buffers,
        share.states,
        share.gradients,
        passes.saved if passes is not None else None,
        temporary,
        {peak.moment: peak.total for peak in peaks},
        max(peaks, key=lambda peak: peak.total, default=None),
        share,
        tuple(notes),
    )


def _notes(settings: Settings, parts: Parts, passes: Passes | None) -> list[str]:
    notes = []
    if parts.turns:
        notes.append(
            "parameters take turns: planned is the fullest of the first 64 periods "
            f"(number {parts.period + 1})"
        )
    if settings.update_in_backward and not settings.updates_at_once:
        between = parts.between_refreshes / 1e9
        notes.append(
            "accumulation, or clipping by a common norm, makes updates wait: gradients take "
            f"{between:.2f} GB between refreshes, but all of them exist at a refresh, which is "
            "what is planned; clipping 'each' without accumulation frees them at once"
        )
    if settings.ranks > 1:
        notes.append(
            "what the fullest device holds, cut as `subspan train` on several processes cuts; "
            "activations include gathered weights and gradients that are not yet reduced"
        )
    if settings.model.base_weights == "int4":
        notes.append("base weights in int4: two codes per byte and a float32 per 64 of them")
    if settings.model.attention == "flash":
        notes.append("flash attention is planned as sdpa, whose fused kernels keep the same")
    if passes is not None and passes.blocks is not None:
        notes.append(f"activations: {passes.blocks} of the equal blocks were run, at two depths")
    return notes
