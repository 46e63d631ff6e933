"""What one of N devices holds under FSDP2, as `subspan train` on N processes sets it up.

Every parameter is cut along its rows; every block is a unit, and so is the rest of the model. What
a device keeps of the optimizer's state is decided by the engine's own rules
(`subspan.optim.placing`): its share of states that have the rows of their parameter, all bases of
those, and the states of the whole matrices that it owns.

Exact: weights, gradients and states. Estimates: at the fullest moment the weights of two blocks
(one computes, one is prefetched) and of everything outside the blocks are gathered, and the
gradients of one block are not yet reduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from subspan.optim.composition import Composition
from subspan.optim.listing import active_in, slot_bytes
from subspan.optim.placing import Shard, Way, sliced, way_of
from subspan.plan.parts import Parts
from subspan.subspaces.layout import Layout

Sizes = dict[str, int]


@dataclass(frozen=True)
class Shares:
    """Bytes on the device that holds the most.

    Args:
        rank: which it is.
        weights: its share.
        gradients: its share, reduced.
        states: what it keeps, by kind.
        gathered: whole weights at the fullest moment.
        unreduced: whole gradients then.
        visiting: weight and gradient of a matrix whose state one device owns, in the step.
    """

    rank: int
    weights: int
    gradients: int
    states: Sizes
    gathered: int
    unreduced: int
    visiting: int


@dataclass(frozen=True)
class _Processes:
    """As much of a process group as `Shard` asks for."""

    ranks: int
    number: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.number


@dataclass(frozen=True)
class _Cut:
    """One trained parameter over the devices; `load` is the state that makes an owner busy."""

    group: int
    rows: int
    weight: int
    gradient: int
    layout: Layout
    parts: Composition | None
    dtype: torch.dtype
    way: Way
    load: int

    def shard(self, ranks: int, number: int) -> Shard:
        group: Any = _Processes(ranks, number)
        return Shard(0, self.rows, group)

    def states(self, shard: Shard) -> Sizes:
        """Bytes by kind that a device keeps which holds that piece, or owns the whole."""
        if self.parts is None:
            return {}
        return slot_bytes(self.parts, sliced(self.layout, self.way, shard), self.dtype)


def shares(module: nn.Module, parts: Parts, ranks: int) -> Shares:
    """What the fullest of `ranks` devices holds; see the module."""
    cuts = list(_cuts(parts))
    owners = _owners([cut for cut in cuts if cut.way == "whole"], ranks)
    frozen = [held for held in parts.parameters if not held.gradient]
    trained = {cut.layout.name for cut in cuts}
    known: dict[Any, Sizes] = {}
    best: Shares | None = None
    for rank in range(ranks):
        weights, gradients, states = 0, 0, dict[str, int]()
        for held in frozen:
            if held.name not in trained:
                rows = held.shape[0] if held.shape else 1
                weights += _part(held.weight, rows, ranks, rank)
        for place, cut in enumerate(cuts):
            shard = cut.shard(ranks, rank)
            length = shard.length(rank)
            weights += cut.weight * length // cut.rows
            gradients += cut.gradient * length // cut.rows
            if cut.way == "whole" and owners[id(cut)] != rank:
                continue
            key = (place, 0 if cut.way == "whole" else length)
            if key not in known:
                known[key] = cut.states(shard)
            for kind, size in known[key].items():
                states[kind] = states.get(kind, 0) + size
        found = Shares(rank, weights, gradients, states, 0, 0, 0)
        if best is None or _total(found) > _total(best):
            best = found
    assert best is not None
    gathered, unreduced = _units(module, parts)
    visiting = max((c.weight + c.gradient for c in cuts if c.way == "whole"), default=0)
    return replace(best, gathered=gathered, unreduced=unreduced, visiting=visiting)


def _total(share: Shares) -> int:
    return share.weights + share.gradients + sum(share.states.values())


def _part(size: int, rows: int, ranks: int, rank: int) -> int:
    chunk = -(-rows // ranks)
    return size * max(0, min(chunk, rows - rank * chunk)) // max(rows, 1)


def _cuts(parts: Parts) -> Iterator[_Cut]:
    """The optimizer's parameters in its order, each with the way the engine would choose."""
    optimizer, active = parts.optimizer, active_in(parts.optimizer, parts.period)
    sizes = {held.name: held for held in parts.parameters}
    for position, group in enumerate(optimizer.param_groups):
        composition = optimizer.composition(position)
        for parameter in group["params"]:
            layouts = [(optimizer.layout_in(parameter, True), composition)]
            if composition.idle is not None:
                layouts.append((optimizer.layout_in(parameter, False), composition.idle))
            ways = {way_of(layout, c.parts_for(layout), 0) for layout, c in layouts}
            busy, now = composition.parts_for(layouts[0][0]), active[parameter]
            layout = optimizer.layout_in(parameter, now)
            yield _Cut(
                position,
                max(1, parameter.shape[0] if parameter.dim() else 1),
                sizes[layout.name].weight,
                parameter.numel() * parameter.dtype.itemsize,
                layout,
                optimizer.parts_in(parameter, now),
                parameter.dtype,
                ways.pop() if len(ways) == 1 else "whole",
                sum(slot_bytes(busy, layouts[0][0], parameter.dtype).values()),
            )


def _owners(cuts: list[_Cut], ranks: int) -> dict[int, int]:
    """id of what is kept whole -> its device: group by group the largest state first, to who has
    least."""
    load = dict.fromkeys(range(ranks), 0)
    owners = {}
    for cut in sorted(cuts, key=lambda cut: (cut.group, -cut.load)):
        owners[id(cut)] = min(load, key=load.__getitem__)
        load[owners[id(cut)]] += max(1, cut.load)
    return owners


def _units(module: nn.Module, parts: Parts) -> tuple[int, int]:
    """(bytes of weights gathered at a time, bytes of gradients that are not reduced)."""
    by_name = {held.name: held for held in parts.parameters}
    blocks = _blocks(module)
    inside = {name for names in blocks for name in names}
    held = [[by_name[name] for name in names if name in by_name] for names in blocks]
    weights = [sum(item.weight for item in block) for block in held]
    gradients = [sum(item.gradient for item in block) for block in held]
    outside = sum(item.weight for name, item in by_name.items() if name not in inside)
    return outside + sum(sorted(weights)[-2:]), max(gradients, default=parts.gradients)


def _blocks(module: nn.Module) -> list[list[str]]:
    """Names of the parameters of every unit but the last, the rest of the model."""
    kinds = set(getattr(module, "_no_split_modules", None) or ())
    return [
        [f"{path}.{name}" for name, _ in block.named_parameters()]
        for path, block in module.named_modules()
        if type(block).__name__ in kinds
    ]
