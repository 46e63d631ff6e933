"""Ranks that change at refreshes: choosing them, and carrying a state over to another rank."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.bucket import BASIS_NAMES, Bucket
from subspan.optim.collect import allocate, refresh_is_due
from subspan.optim.composition import Composition
from subspan.subspaces.layout import Layout
from subspan.subspaces.ranks import EnergyRank, energies, ranks_for

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer


def adapt_ranks(
    optimizer: SubspaceOptimizer,
    group: dict[str, Any],
    parts: Composition,
    ready: list[Tensor],
) -> None:
    """Choose the ranks of those of a group's matrices whose subspace is due for a refresh."""
    policy = parts.rank
    if not isinstance(policy, EnergyRank):
        return
    due = [p for p in ready if optimizer.layout_of(p).projected and _due(optimizer, p, parts)]
    due = [p for p in due if p.grad is not None and bool(p.grad.any())]
    if not due:
        return
    spectra, costs = [], []
    for parameter in due:
        layout = optimizer.layout_of(parameter)
        assert parameter.grad is not None
        spectra.append(energies(parameter.grad.reshape(layout.view)))
        costs.append(_bytes(parts, replace(layout, rank=2), parameter, 1))
    others = [p for p in optimizer.projected(group) if p not in set(due)]
    spent = sum(
        _bytes(parts, optimizer.layout_of(p), p) for p in others if "step" in optimizer.state[p]
    )
    for parameter, rank in zip(due, ranks_for(spectra, costs, policy, spent), strict=True):
        resize(optimizer, parameter, parts, rank, group["seed"])


def _due(optimizer: SubspaceOptimizer, parameter: Tensor, parts: Composition) -> bool:
    state = optimizer.state[parameter]
    return "step" not in state or refresh_is_due(optimizer, parameter, parts, state)


def _bytes(parts: Composition, layout: Layout, parameter: Tensor, below: int = 0) -> int:
    """Bytes of a parameter's state; minus those of a rank that is smaller by `below`."""

    def total(chosen: Layout) -> int:
        slots = parts.slots(chosen, parameter.dtype).values()
        sizes = (shape.numel() * dtype.itemsize for _, (shape, dtype) in _sized(slots))
        return sum(sizes)

    smaller = total(replace(layout, rank=layout.rank - below)) if below else 0
    return total(layout) - smaller


def _sized(slots: Any) -> Any:
    return ((kind, (torch.Size(shape), dtype)) for kind, (shape, dtype) in slots)


def resize(
    optimizer: SubspaceOptimizer, parameter: Tensor, parts: Composition, rank: int, seed: int
) -> None:
    """Give a parameter another rank.

    Leading slots of moments and basis are kept; new slots have moments of zero and random basis
    columns, which the refresh that follows replaces.
    """
    old, state = optimizer.layout_of(parameter), optimizer.state[parameter]
    new = replace(old, rank=rank)
    optimizer.set_layout(parameter, new)
    if "step" not in state or rank == old.rank:
        state["rank"] = rank
        return
    before = Bucket(
        [parameter], [], [state], [old], state["step"], 1, codecs=parts.codecs(old)
    ).load()
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    state.clear()
    state.update(numbers, rank=rank)
    allocate(new, parameter, parts, state)
    after = Bucket([parameter], [], [state], [new], state["step"], 1, codecs=parts.codecs(new))
    loaded = after.load()
    for declared in parts.declarations(new):
        name = declared.name
        target, source = loaded[name], before[name]
        if name in BASIS_NAMES:
            draw = linalg.derive_seed(seed, new.index, state["step"])
            target.copy_(linalg.gaussian(draw, tuple(target.shape), target.dtype) / 10)
        common = tuple(slice(0, min(a, b)) for a, b in zip(source.shape, target.shape, strict=True))
        target[common] = source[common]
        if name in after.codecs:
            after.keep(name, target)
        elif target.data_ptr() != state[name].data_ptr():
            state[name].copy_(target)
