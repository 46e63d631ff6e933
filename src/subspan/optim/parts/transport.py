"""Transport: what happens to the moments when the basis changes.

`C = Q_new^T Q_old` turns old coordinates into new ones. Means transform linearly, variances with
squared coefficients (coordinates taken as uncorrelated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from subspan.optim.parts.inner import Inner
from subspan.subspaces.layout import Side
from subspan.subspaces.tucker import turn

Change = Tensor | tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Keep:
    """The moments stay as they are, although their coordinates change meaning (GaLore)."""

    restarts: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def apply(
        self, inner: Inner, state: dict[str, Any], change: Change, side: Side, age: int
    ) -> None:
        """Transport the moments of one bucket in place; `age` counts the steps they have seen."""


@dataclass(frozen=True)
class Reset(Keep):
    """The moments start again from zero, with their bias correction (FRUGAL)."""

    restarts: ClassVar[bool] = True


@dataclass(frozen=True)
class Rotate(Keep):
    """`M <- C M`, `V <- (C∘C) V`: what the moments say in the old basis is said in the new one."""

    moves: ClassVar[bool] = True

    def apply(
        self, inner: Inner, state: dict[str, Any], change: Change, side: Side, age: int
    ) -> None:
        """See the class."""
        if inner.first_moment:
            moment = state[inner.first_moment]
            moment.copy_(_turn(moment, change, side))
        if inner.second_moment:
            moment = state[inner.second_moment]
            moment.copy_(_turn(moment, _squared(change), side))


@dataclass(frozen=True)
class ProjectionAware(Keep):
    """Statistical transport of both Adam moments (LDAdam; also SubTrack++, GrassWalk, GrassJump).

    With bias-corrected `m = M / (1 - b1^t)` and `v = V / (1 - b2^t)` of the steps so far:

        M <- C M,   V <- (1 - b2^t) | (C∘C)(v - m∘m) + (C m)∘(C m) |

    The variance around the mean moves with squared coefficients, the mean itself linearly. Robert
    et al.: LDAdam, 2024, arXiv 2410.16103.
    """

    moves: ClassVar[bool] = True

    def apply(
        self, inner: Inner, state: dict[str, Any], change: Change, side: Side, age: int
    ) -> None:
        """See the class."""
        if inner.first_moment is None:
            return
        # `v - m∘m` subtracts nearly equal numbers and the update divides by its root:
        # float64 keeps it meaningful.
        first, second = state[inner.first_moment], inner.second_moment
        exact, wide = first.double(), _double(change)
        turned = _turn(exact, wide, side)
        if second:
            mean_scale, scale = inner.momentum_correction(age), inner.variance_correction(age)
            spread = state[second].double().mul_(scale).sub_((exact * mean_scale).square_())
            spread = _turn(spread, _squared(wide), side)
            state[second].copy_(spread.add_((turned * mean_scale).square_()).abs_().div_(scale))
        first.copy_(turned)


def _double(change: Change) -> Change:
    if isinstance(change, tuple):
        return tuple(None if c is None else c.double() for c in change)
    return change.double()


def _turn(moment: Tensor, change: Change, side: Side) -> Tensor:
    if isinstance(change, tuple):
        if side == "modes":
            return turn(moment, change)
        left, right = change
        assert left is not None and right is not None
        return left @ moment @ right.mT
    return change @ moment if side == "left" else moment @ change.mT


def _squared(change: Change) -> Change:
    if isinstance(change, tuple):
        return tuple(None if c is None else c.square() for c in change)
    return change.square()
