"""Muon as an inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from subspan import linalg
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

Adjust = Literal["original", "match_rms_adamw", "none"]


@dataclass(frozen=True)
class Muon(Inner):
    """Muon (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024).

        M <- momentum M + (1 - momentum) R;  X = (1 - momentum) R + momentum M (Nesterov) or M
        value = NewtonSchulz(X), step = lr f(m, n)

    The iteration brings singular values near 1, not to 1. `f` is `sqrt(max(1, m/n))` ("original"),
    `0.2 sqrt(max(m, n))` ("match_rms_adamw") or 1 ("none") for m x n coordinates. Vectors fall
    back to Adam with the same learning rate.

    Args:
        momentum: averaging rate.
        nesterov: see above.
        steps: Newton-Schulz iterations.
        adjust: the factor f.
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    adjust: Adjust = "original"

    needs_matrix: ClassVar[bool] = True
    first_moment = "momentum_buffer"

    def __post_init__(self) -> None:
        check_non_negative(momentum=self.momentum, steps=self.steps)
        if self.adjust not in ("original", "match_rms_adamw", "none"):
            raise ValueError(f"adjust={self.adjust!r} must be original, match_rms_adamw or none")

    @property
    def momentum_weight(self) -> float:
        """The momentum."""
        return self.momentum

    def fallback(self) -> Inner:
        """Adam, for vectors."""
        return Adam()

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One moment."""
        return (StateDeclaration("momentum_buffer", "first_moment"),)

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        moment = state["momentum_buffer"].lerp_(coordinates, 1.0 - self.momentum)
        ahead = moment
        if self.nesterov:
            ahead = work.like(coordinates).copy_(coordinates).lerp_(moment, self.momentum)
        value = linalg.newton_schulz(ahead, steps=self.steps)
        m, n = coordinates.shape[-2:]
        factor = 1.0
        if self.adjust == "original":
            factor = max(1.0, m / n) ** 0.5
        elif self.adjust == "match_rms_adamw":
            factor = 0.2 * max(m, n) ** 0.5
        return Direction(value, lr * factor)
