"""The equal blocks of a model: a model of two blocks more costs what two blocks cost more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Run:
    """Consecutive equal blocks of a model.

    Args:
        path: name of the list of blocks in the model.
        first: position of the first of them in the list.
        count: how many there are.
        period: blocks after which the kinds of attention repeat.
    """

    path: str
    first: int
    count: int
    period: int = 1

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks, in a model that has them."""
        whole = model.get_submodule(self.path)
        assert isinstance(whole, nn.ModuleList)
        return list(whole)[self.first : self.first + self.count]

    def lengths(self) -> tuple[int, int] | None:
        """Two numbers of blocks, a period apart, from which `count` can be extrapolated.

        At least two, the first and the last: what is alive in the backward pass of one between
        them lies between theirs. None if that saves nothing.
        """
        short = 2 + (self.count - 2) % self.period
        longer = short + self.period
        return (short, longer) if longer < self.count else None

    @contextmanager
    def shortened(self, model: nn.Module, count: int) -> Iterator[Run]:
        """For the duration of the context a model has only `count` of the blocks."""
        parent, _, name = self.path.rpartition(".")
        owner, whole = model.get_submodule(parent), model.get_submodule(self.path)
        assert isinstance(whole, nn.ModuleList)
        kept = list(whole)
        del kept[self.first + count : self.first + self.count]
        setattr(owner, name, nn.ModuleList(kept))
        try:
            yield replace(self, count=count)
        finally:
            setattr(owner, name, whole)


def longest_run(model: nn.Module) -> Run | None:
    """The longest run of equal blocks in any list of blocks of a model; None if there is none."""
    best: Run | None = None
    for path, module in model.named_modules():
        if path and isinstance(module, nn.ModuleList):
            found = _run(model, path, module)
            if found is not None and (best is None or found.count > best.count):
                best = found
    return best


def _run(model: nn.Module, path: str, blocks: nn.ModuleList) -> Run | None:
    marks = [_mark(block) for block in blocks]
    best = (0, 0)
    start = 0
    for position in range(1, len(marks) + 1):
        if position == len(marks) or marks[position] != marks[start]:
            best = max(best, (position - start, -start))
            start = position
    count, first = best[0], -best[1]
    if count < 2:
        return None
    owner = model.get_submodule(path.rpartition(".")[0])
    period = _period(_kinds(owner, len(blocks))[first : first + count])
    return Run(path, first, count, period) if period is not None else None


def _mark(block: nn.Module) -> tuple[Any, ...]:
    """What two blocks must share to cost the same."""
    return (
        type(block),
        tuple(
            (name, p.shape, p.dtype, type(p), p.requires_grad)
            for name, p in block.named_parameters()
        ),
        tuple(type(module) for module in block.modules()),
    )


def _kinds(owner: nn.Module, count: int) -> list[Any]:
    """The kind of attention of every block, where a configuration lists them."""
    config = getattr(owner, "config", None)
    listed = getattr(config, "layer_types", None)
    return list(listed) if listed is not None and len(listed) == count else [None] * count


def _period(kinds: list[Any]) -> int | None:
    for period in range(1, _LONGEST_PERIOD + 1):
        if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
            return period
    return None
