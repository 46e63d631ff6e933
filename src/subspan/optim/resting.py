"""Parameters that rest need no gradient: turning `requires_grad` off and on with the activity.

A parameter that the user has frozen before it is given to an optimizer never takes part; one that
is frozen while its turn lasts is left alone until the turn ends. Parameters that only rest are
known as such, so that another optimizer of the same model finds them trainable.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from subspan.optim.parts.activity import Activity

if TYPE_CHECKING:
    from subspan.optim.roster import Roster

# Parameters whose gradient an optimizer has turned off for a while.
_RESTING = WeakTensorKeyDictionary()


def is_trainable(parameter: Tensor) -> bool:
    """Whether a parameter requires a gradient, or would if it did not rest."""
    return parameter.requires_grad or parameter in _RESTING


def rests(parameter: Tensor) -> bool:
    """Whether an optimizer has turned a parameter's gradient off for a while."""
    return parameter in _RESTING


def wake(parameters: Iterable[Tensor]) -> None:
    """Turn the gradient of parameters that rest on again."""
    for parameter in parameters:
        if parameter in _RESTING:
            del _RESTING[parameter]
            parameter.requires_grad_(True)


def follow_activity(
    optimizer: Roster,
    group: dict[str, Any],
    activity: Activity,
    before: int | None = None,
) -> None:
    """Let rest what rests in the coming step of a group, and wake what does not.

    Resting parameters lose their gradient, too.

    Args:
        optimizer: whose parameters they are.
        group: the param group.
        activity: says who is active.
        before: step count of the group that `requires_grad` follows so far; None: no one rests.
    """
    if optimizer.sharding is not None:
        # FSDP2 looks at `requires_grad` once, when it first gathers a parameter.
        return
    everyone = optimizer.projected(group)
    layouts = [optimizer.layout_of(parameter) for parameter in everyone]
    period = activity.period(group["steps"])
    active = activity.active(period, layouts)
    was_active = frozenset(range(len(everyone)))
    if before is not None:
        if activity.period(before) == period:
            return
        was_active = activity.active(activity.period(before), layouts)
    for position, parameter in enumerate(everyone):
        if position not in active:
            parameter.requires_grad_(False)
            parameter.grad = None
            _RESTING[parameter] = True
        elif position not in was_active:
            # A deep copy of a resting parameter is not among the known ones.
            parameter.requires_grad_(True)
            _RESTING.pop(parameter, None)
