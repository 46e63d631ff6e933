"""Adam whose direction already carries the bias corrections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subspan.optim.parts.inner import Adam, Direction, Rate
from subspan.optim.parts.workspace import Workspace


@dataclass(frozen=True)
class CorrectedAdam(Adam):
    """The same steps as `Adam`, split differently into direction and step size.

        value = sqrt(1 - b2^t) / (1 - b1^t) M / (sqrt(V) + e),  step = lr

    It matters to a remainder that remembers norms: its growth limiter then compares residuals as
    they are applied, not as they were before the corrections (as the released codes of Fira and
    SubTrack++ do).
    """

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        direction = super().update(coordinates, state, age, 1.0, work)
        return Direction(direction.value.mul_(direction.step), lr)
