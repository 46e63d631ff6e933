"""What a step sees: the gradient, this step's subspace, and the coordinates in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspan.optim.bucket import FIND, FOLLOW, Bucket
from subspan.optim.collect import check_bucket, checked_in_bucket
from subspan.optim.composition import Composition
from subspan.optim.parts.scene import MomentumLoss, Seen
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.bases import Dense, Subspace
from subspan.subspaces.finders import Sight

State = dict[str, Any]


def look(
    bucket: Bucket, parts: Composition, group: dict[str, Any], state: State, work: Workspace
) -> Seen:
    """Normalise the gradient, add the fed-back error, refresh the subspace if due, and project.

    Args:
        bucket: whose gradients, or coordinates, they are.
        parts: what updates it.
        group: its param group.
        state: its loaded state, updated in place.
        work: scratch memory.
    """
    if bucket.coordinates:
        assert parts.finder is not None
        subspace = parts.finder.unpack(state, bucket.layout, bucket.dtype, bucket.device)
        given = bucket.coordinates[0] if bucket.single else torch.stack(bucket.coordinates)
        return Seen(given, given, subspace, None, False)
    gradient = bucket.gather(bucket.gradients, work)
    late = checked_in_bucket(group, bucket.device) and not parts.elementwise
    shown = parts.shows_bad_gradients and not bucket.due
    sums = None
    if parts.normaliser is not None and parts.normaliser.after:
        sums = parts.normaliser.sums(gradient, state, work)
    if late and not shown:
        check_bucket(bucket, gradient if sums is None else sums)
    if parts.normaliser is not None and not parts.normaliser.after:
        gradient = parts.normaliser.normalise(gradient, state, bucket.step, work)
    if "error" in state:
        gradient = _with_error(bucket, parts, gradient, state, work)
    if parts.finder is None:
        return Seen(gradient, gradient, None, None, False, sums=sums)

    subspace, loss, refreshed = _in_force(bucket, parts, group, gradient, state, work)
    if parts.complement:
        return Seen(gradient, subspace.residual(gradient).mul_(parts.gain), None, loss, refreshed)
    lead = gradient.shape[: gradient.dim() - len(bucket.layout.view)]
    out = work.take((*lead, *bucket.layout.coordinates), gradient.dtype, gradient.device)
    coordinates = subspace.project(gradient, out=out)
    norms = parts.output.measure(gradient, bucket.layout, parts.remainder, work)
    if late and shown:
        check_bucket(bucket, coordinates if norms is None else norms)
    if parts.gain != 1.0:
        coordinates = coordinates.mul_(parts.gain)
    return Seen(gradient, coordinates, subspace, loss, refreshed, norms, sums)


def _with_error(
    bucket: Bucket, parts: Composition, gradient: Tensor, state: State, work: Workspace
) -> Tensor:
    """The gradient plus the error buffer; in the buffer, unless something reads it later on."""
    error: Tensor = state["error"]
    late = parts.finder is not None and parts.finder.follows
    if not late and parts.normaliser is None:
        return error.add_(gradient)
    out = gradient if bucket.owns(gradient) else work.like(gradient)
    return torch.add(gradient, error, out=out)


def _in_force(
    bucket: Bucket,
    parts: Composition,
    group: dict[str, Any],
    gradient: Tensor,
    state: State,
    work: Workspace,
) -> tuple[Subspace, MomentumLoss | None, bool]:
    """This step's subspace, what the momentum lost if it is new, and whether it is."""
    finder, layout, inner = parts.finder, bucket.layout, parts.inner
    assert finder is not None
    moment = inner.first_moment
    first = state["refreshed"][0] == 0
    previous = None if first else finder.unpack(state, layout, gradient.dtype, gradient.device)
    due = bucket.due
    if previous is not None and not due:
        due = parts.refresh.drifted(gradient, previous, state, bucket.step)
    if previous is not None and (not due or bucket.blank):
        return previous, None, False
    if first or bucket.step - state["refreshed"][0] > 1:
        # Finders need more memory than the rest of a step, which is not kept waiting meanwhile.
        # Those that find at every step would only have it mapped in again.
        work.trim()

    before = momentum = None
    if previous is not None and bucket.age > 1 and moment is not None:
        held: Tensor = state[moment]
        before = work.like(held).copy_(held) if parts.reads_momentum_loss else None
        if finder.reads_momentum:
            correction = inner.momentum_correction(bucket.age - 1)
            momentum = torch.mul(held, correction, out=work.like(held))
    seeds = bucket.seeds(group["seed"], FIND)
    sight = Sight(
        gradient,
        layout,
        bucket.layouts,
        previous,
        momentum,
        seeds,
        state,
        bucket.step,
        scratch=work.like,
    )
    found = finder.find(sight) if bucket.found is None else bucket.found
    stacked = len(layout.view) > 2 and layout.side != "modes" and finder.reads_gradient
    if stacked and isinstance(found, Dense) and isinstance(previous, Dense):
        # Single matrices of a stack may have no gradient (experts that saw no token).
        silent = gradient.abs().amax((-2, -1), keepdim=True) == 0
        kept = torch.where(silent, previous.basis, found.basis)
        found = Dense(found.side, kept, found.orthonormal)
    loss = None
    if previous is not None:
        _transport(bucket, parts, state, previous, found, work)
        if before is not None and moment is not None:
            after = work.like(state[moment]).copy_(state[moment])
            loss = MomentumLoss(previous, before, found, after)
    parts.refresh.found(gradient, previous, found, state)
    found = _store(bucket, parts, state, found)
    state["refreshed"] = [0 if bucket.blank else bucket.step] * len(bucket.states)
    return found, loss, True


def _store(bucket: Bucket, parts: Composition, state: State, found: Subspace) -> Subspace:
    """Put a subspace into the state; what comes back is it as the state holds it."""
    finder = parts.finder
    assert finder is not None
    lossy = False
    for name, value in finder.pack(found).items():
        state[name] = value
        if name in bucket.codecs:
            bucket.keep(name, value)
            state[name], lossy = bucket.read(name), True
    return finder.unpack(state, bucket.layout, bucket.dtype, bucket.device) if lossy else found


def follow(
    bucket: Bucket, parts: Composition, group: dict[str, Any], state: State, seen: Seen
) -> None:
    """Let a finder that moves with every step take its own."""
    finder, seeds = parts.finder, bucket.seeds(group["seed"], FOLLOW)
    assert finder is not None
    ratio = float(group["lr"]) / (float(group.get("initial_lr", group["lr"])) or 1.0)
    sight = Sight(
        seen.gradient,
        bucket.layout,
        bucket.layouts,
        seen.subspace,
        None,
        seeds,
        state,
        bucket.step,
        ratio,
        seen.coordinates if parts.gain == 1.0 else None,
    )
    _store(bucket, parts, state, finder.follow(sight))
    seen.refreshed = True


def _transport(
    bucket: Bucket,
    parts: Composition,
    state: State,
    previous: Subspace,
    found: Subspace,
    work: Workspace,
) -> None:
    if parts.transport.restarts:
        for declared in parts.inner.declare(bucket.layout):
            state[declared.name].zero_()
        if not parts.transport.keeps_age:
            state["restarted"] = [bucket.step - 1] * len(bucket.states)
            bucket.age = 1
    elif parts.transport.moves and bucket.age > 1:
        change = found.slots_from(previous) or found.change_from(previous)
        side = bucket.layout.side
        assert side is not None
        parts.transport.apply(parts.inner, state, change, side, bucket.age - 1, work.like)
