"""Transport: what happens to the moments when the basis changes.

`C = Q_new^T Q_old` turns old coordinates into new ones. Means transform linearly, variances with
squared coefficients (coordinates taken as uncorrelated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from subspan.linalg.products import product
from subspan.optim.parts.inner import Inner
from subspan.subspaces.finder import Scratch
from subspan.subspaces.fixed_columns import Slots
from subspan.subspaces.layout import Side
from subspan.subspaces.tucker import turn

Change = Tensor | tuple[Tensor | None, ...] | Slots


@dataclass(frozen=True)
class Keep:
    """The moments stay as they are, although their coordinates change meaning (GaLore).

    - restarts: the moments start again from zero.
    - keeps_age: their bias correction counts on nevertheless.
    - moves: `apply` does something.
    - needs_second: a second moment that `apply` cannot move may not stay behind.
    """

    restarts: ClassVar[bool] = False
    keeps_age: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    needs_second: ClassVar[bool] = True

    def apply(
        self,
        inner: Inner,
        state: dict[str, Any],
        change: Change,
        side: Side,
        age: int,
        scratch: Scratch = torch.empty_like,
    ) -> None:
        """Transport the moments of one bucket in place.

        Args:
            inner: whose moments they are.
            state: the bucket's.
            change: from old coordinates to new ones.
            side: on which it is multiplied.
            age: the steps that the moments have seen.
            scratch: where large temporaries come from.
        """


@dataclass(frozen=True)
class Reset(Keep):
    """The moments start again from zero, with their bias correction (FRUGAL)."""

    restarts: ClassVar[bool] = True


@dataclass(frozen=True)
class Forget(Reset):
    """The moments start again from zero, but their bias correction counts on.

    For Subspace-Momentum, whose step is corrected for a second moment outside the subspace, which
    goes on.
    """

    keeps_age: ClassVar[bool] = True


@dataclass(frozen=True)
class Rotate(Keep):
    """`M <- C M`, `V <- (C∘C) V`: what the moments say in the old basis is said in the new one."""

    moves: ClassVar[bool] = True

    def apply(
        self,
        inner: Inner,
        state: dict[str, Any],
        change: Change,
        side: Side,
        age: int,
        scratch: Scratch = torch.empty_like,
    ) -> None:
        """See the class."""
        if inner.first_moment:
            moment = state[inner.first_moment]
            moment.copy_(_turn(moment, change, side, scratch))
        if inner.second_moment:
            moment = state[inner.second_moment]
            moment.copy_(_turn(moment, _squared(change), side, scratch))


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
        self,
        inner: Inner,
        state: dict[str, Any],
        change: Change,
        side: Side,
        age: int,
        scratch: Scratch = torch.empty_like,
    ) -> None:
        """See the class."""
        if inner.first_moment is None:
            return
        first = state[inner.first_moment]
        turned = _turn(first, change, side, scratch)
        if inner.second_moment:
            second = state[inner.second_moment]
            # Both corrections as one factor on the squared mean.
            share = inner.momentum_correction(age) ** 2 / inner.variance_correction(age)
            spread = second.addcmul_(first, first, value=-share)
            spread = _turn(spread, _squared(change), side, scratch)
            torch.abs(spread.addcmul_(turned, turned, value=share), out=second)
        first.copy_(turned)


@dataclass(frozen=True)
class Reproject(Keep):
    """`M <- C M`, `V <- (C sqrt(V))∘(C sqrt(V))` (COAP's `restore_state`).

    Lifted with the old basis and projected on the new one, the second moment as its root. A second
    moment in another form (Adafactor's factored one) stays as it is. Xiao et al.: COAP, 2024, arXiv
    2412.00071.
    """

    moves: ClassVar[bool] = True
    needs_second: ClassVar[bool] = False

    def apply(
        self,
        inner: Inner,
        state: dict[str, Any],
        change: Change,
        side: Side,
        age: int,
        scratch: Scratch = torch.empty_like,
    ) -> None:
        """See the class."""
        if inner.first_moment:
            moment = state[inner.first_moment]
            moment.copy_(_turn(moment, change, side, scratch))
        if inner.second_moment:
            moment = state[inner.second_moment]
            moment.copy_(_turn(moment.sqrt(), change, side).square_())


@dataclass(frozen=True)
class FirstBasisAware(Keep):
    """The transport of SubTrack++'s released code, which departs from its paper.

        C = Q_old^T Q_first;  M <- C M,  V <- (1 - b2) | (C∘C)(V - M∘M) + (C M)∘(C M) |

    It turns from the very first basis, just before the new one is found, and its factor shrinks the
    second moment about a thousandfold. Only for comparisons with that code; the paper's is
    `ProjectionAware`. Needs a finder that stores `first_basis`.
    """

    moves: ClassVar[bool] = True

    def apply(
        self,
        inner: Inner,
        state: dict[str, Any],
        change: Change,
        side: Side,
        age: int,
        scratch: Scratch = torch.empty_like,
    ) -> None:
        """See the class; `change` is not used."""
        if inner.first_moment is None or inner.second_moment is None:
            return
        # The state still holds the old basis.
        turned = state["basis"].mT @ state["first_basis"]
        first, second = state[inner.first_moment], state[inner.second_moment]
        mean = _turn(first, turned, side)
        spread = _turn(second - first.square(), turned.square(), side)
        # 1 - b2, as the first step's correction
        share = 1.0 / inner.variance_correction(1)
        second.copy_(spread.add_(mean.square()).abs_().mul_(share))
        first.copy_(mean)


def _turn(
    moment: Tensor, change: Change, side: Side, scratch: Scratch = torch.empty_like
) -> Tensor:
    if isinstance(change, tuple):
        if side == "modes":
            return turn(moment, change)
        left, right = change
        assert left is not None and right is not None
        return left @ moment @ right.mT
    if isinstance(change, Slots):
        assert side == "left" or side == "right"
        return change.move(moment, side)
    a, b = (change, moment) if side == "left" else (moment, change.mT)
    fits = a.dtype == b.dtype and change.shape[-2] == change.shape[-1]
    return product(a, b, scratch(moment)) if fits else a @ b


def _squared(change: Change) -> Change:
    if isinstance(change, tuple):
        return tuple(None if c is None else c.square() for c in change)
    return change if isinstance(change, Slots) else change.square()
