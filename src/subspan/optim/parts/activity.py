"""Activity: which projected parameters of a group are active in a period.

Active ones follow the composition itself, the others its `idle` composition, or rest if it has
none. Who is active is a pure function of the period, so nothing has to be remembered over a resume.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from subspan import linalg
from subspan.subspaces.layout import Layout

Order = Literal["random", "ascending", "descending", "mirror"]
BlockOrder = Literal["random", "ascending", "descending"]


@dataclass(frozen=True)
class Activity:
    """Base. Subclasses have `gap`, the steps per period.

    - freezes: parameters that rest need no gradient; their `requires_grad` is turned off.
    - takes_all: vectors, embeddings and norms belong to it, too, unless a group says
      `project=False`.
    """

    freezes: ClassVar[bool] = False
    takes_all: ClassVar[bool] = False

    def period(self, steps: int) -> int:
        """The period of the step after `steps` steps of the group, 0-based."""
        raise TypeError(f"{type(self).__name__} does not define period()")

    def check(self, layouts: Sequence[Layout]) -> None:
        """Refuse a group that the order cannot serve."""

    def active(self, period: int, layouts: Sequence[Layout]) -> frozenset[int]:
        """Positions of the active ones among the group's projected parameters."""
        raise TypeError(f"{type(self).__name__} does not define active()")

    def always(self, layouts: Sequence[Layout]) -> frozenset[int]:
        """Those that are active in every period, and keep their state over all of them."""
        return frozenset()


@dataclass(frozen=True)
class Blocks(Activity):
    """A share of the group's projected tensors is active at a time (FRUGAL).

    Args:
        density: share of tensors active at a time, rounded half to even.
        gap: steps per period.
        order: "random" draws a fresh set every period; "ascending" and "descending" walk through
            the tensors in order; "mirror" takes half from the front and half from the back.
        seed: of the random order.
    """

    density: float
    gap: int
    order: Order = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"density={self.density!r} must lie in [0, 1]")
        check_gap("update_gap", self.gap)
        if self.order not in ("random", "ascending", "descending", "mirror"):
            raise ValueError(
                f"block_order={self.order!r} is not known: use random, ascending, descending or "
                "mirror"
            )

    def period(self, steps: int) -> int:
        """See `Activity`."""
        return steps // self.gap

    def check(self, layouts: Sequence[Layout]) -> None:
        """Refuse a group size that the order cannot serve.

        Raises:
            ValueError: "mirror" with an odd number of active tensors.
        """
        count = len(layouts)
        if self.order == "mirror" and round(count * self.density) % 2:
            raise ValueError(
                "block_order='mirror' needs an even number of active tensors; "
                f"density={self.density} of {count} tensors makes {round(count * self.density)}"
            )

    def active(self, period: int, layouts: Sequence[Layout]) -> frozenset[int]:
        """See `Activity`."""
        count = len(layouts)
        number = round(count * self.density)
        if self.order == "random":
            return _draw(linalg.derive_seed(self.seed, period), count, number)
        if self.order == "mirror":
            half = count // 2
            front = [(period * (number // 2) + i) % half for i in range(number // 2)]
            return frozenset(front) | frozenset(count - 1 - i for i in front)
        walk = [(period * number + i) % count for i in range(number)]
        if self.order == "descending":
            walk = [count - 1 - i for i in walk]
        return frozenset(walk)


@dataclass(frozen=True)
class Sampled(Activity):
    """A few parameters are drawn afresh in every period and are *not* active (GUM).

    Args:
        gap: steps per period.
        share: probability with which each parameter is drawn; or
        number: how many are drawn, without replacement. Just one of the two is given.
        seed: of the draws.
    """

    gap: int
    share: float | None = None
    number: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_gap("update_proj_gap", self.gap)
        if (self.share is None) == (self.number is None):
            raise ValueError("give either share or number")

    def period(self, steps: int) -> int:
        """See `Activity`."""
        return steps // self.gap

    def active(self, period: int, layouts: Sequence[Layout]) -> frozenset[int]:
        """See `Activity`."""
        count, seed = len(layouts), linalg.derive_seed(self.seed, period)
        everyone = frozenset(range(count))
        if self.number is not None:
            return everyone - _draw(seed, count, min(self.number, count))
        # A draw per name and period: who else is in the group does not matter.
        drawn = (
            linalg.derive_seed(seed, layout.index) / (1 << 63) < (self.share or 0.0)
            for layout in layouts
        )
        return everyone - frozenset(i for i, chosen in enumerate(drawn) if chosen)


@dataclass(frozen=True)
class LayerBlocks(Activity):
    """One block of the model, usually a transformer layer, is active at a time (BAdam).

    Args:
        gap: steps per block.
        order: "random" is a fresh permutation of the blocks in every round; "ascending" or
            "descending".
        blocks: every tuple of regular expressions is a block: what one of them matches, and no
            earlier block has. None: tensors whose names share "layers.3", "h.3", "blocks.3" or the
            like are a block; in a model without such names every tensor is.
        others: what belongs to no block (embeddings, head, final norm) rests ("frozen"), or is
            trained in every period ("adamw").
        first_short: the first block gets `gap - 1` steps, as in the released code.
        seed: of the random order.
    """

    gap: int
    order: BlockOrder = "random"
    blocks: tuple[tuple[str, ...], ...] | None = None
    others: Literal["frozen", "adamw"] = "frozen"
    first_short: bool = False
    seed: int = 0

    freezes: ClassVar[bool] = True
    takes_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_gap("switch_block_every", self.gap)
        if self.order not in ("random", "ascending", "descending"):
            raise ValueError(
                f"switch_mode={self.order!r} is not known: use random, ascending or descending"
            )
        if self.others not in ("frozen", "adamw"):
            raise ValueError(f"others={self.others!r} must be frozen or adamw")

    def period(self, steps: int) -> int:
        """See `Activity`."""
        return (steps + self.first_short) // self.gap

    def check(self, layouts: Sequence[Layout]) -> None:
        """Refuse blocks that match nothing.

        Raises:
            ValueError: naming the block.
        """
        for patterns in self.blocks or ():
            if layouts and not any(_matches(patterns, layout.name) for layout in layouts):
                raise ValueError(
                    f"blocks: {patterns!r} matches no parameter; names look like "
                    f"{layouts[0].name!r}"
                )

    def active(self, period: int, layouts: Sequence[Layout]) -> frozenset[int]:
        """See `Activity`."""
        blocks, always = self.partition(layouts), self.always(layouts)
        if not blocks:
            return always
        turn, place = divmod(period, len(blocks))
        if self.order == "random":
            seed = linalg.derive_seed(self.seed, turn)
            place = int(linalg.random_permutation(seed, len(blocks))[place])
        elif self.order == "descending":
            place = len(blocks) - 1 - place
        return blocks[place] | always

    def always(self, layouts: Sequence[Layout]) -> frozenset[int]:
        """See `Activity`."""
        if self.others == "frozen":
            return frozenset()
        return frozenset(range(len(layouts))).difference(*self.partition(layouts))

    def partition(self, layouts: Sequence[Layout]) -> list[frozenset[int]]:
        """The blocks as positions, in the order of the model."""
        members: dict[object, set[int]] = {}
        if self.blocks is not None:
            members = {number: set() for number in range(len(self.blocks))}
        layered = any(_LAYER.search(layout.name) for layout in layouts)
        for position, layout in enumerate(layouts):
            if self.blocks is not None:
                hits = [k for k, p in enumerate(self.blocks) if _matches(p, layout.name)]
                for number in hits[:1]:
                    members[number].add(position)
            elif not layered:
                members[position] = {position}
            elif found := _LAYER.search(layout.name):
                members.setdefault(found.group(0), set()).add(position)
        return [frozenset(block) for block in members.values() if block]


_LAYER = re.compile(r"^.*?(^|\.)(layers?|h|blocks?)\.\d+(?=\.)")


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _draw(seed: int, count: int, number: int) -> frozenset[int]:
    if not number:
        return frozenset()
    return frozenset(linalg.random_coordinates(seed, count, number).tolist())


def check_gap(name: str, gap: object) -> None:
    """Refuse a number of steps that is no positive integer.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not isinstance(gap, int) or isinstance(gap, bool) or gap < 1:
        raise ValueError(f"{name}={gap!r} must be an integer of at least 1")
