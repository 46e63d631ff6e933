"""Activity: which parameters of a group take part in a period."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from subspan import linalg

Order = Literal["random", "ascending", "descending", "mirror"]


@dataclass(frozen=True)
class Blocks:
    """A share of the group's projected tensors is active at a time (FRUGAL).

    The others keep no state. The active set is a pure function of the period, so nothing has to be
    remembered over a resume.

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
        if self.order not in ("random", "ascending", "descending", "mirror"):
            raise ValueError(
                f"block_order={self.order!r} is not known: use random, ascending, descending or "
                "mirror"
            )

    def check(self, count: int) -> None:
        """Refuse a group size that the order cannot serve.

        Raises:
            ValueError: "mirror" with an odd number of active tensors.
        """
        if self.order == "mirror" and round(count * self.density) % 2:
            raise ValueError(
                "block_order='mirror' needs an even number of active tensors; "
                f"density={self.density} of {count} tensors makes {round(count * self.density)}"
            )

    def active(self, period: int, count: int) -> frozenset[int]:
        """Positions of the active ones among `count` tensors in a period, 0-based."""
        number = round(count * self.density)
        if self.order == "random":
            seed = linalg.derive_seed(self.seed, period)
            return (
                frozenset(linalg.random_coordinates(seed, count, number).tolist())
                if number
                else frozenset()
            )
        if self.order == "mirror":
            half = count // 2
            front = [(period * (number // 2) + i) % half for i in range(number // 2)]
            return frozenset(front) | frozenset(count - 1 - i for i in front)
        walk = [(period * number + i) % count for i in range(number)]
        if self.order == "descending":
            walk = [count - 1 - i for i in walk]
        return frozenset(walk)
