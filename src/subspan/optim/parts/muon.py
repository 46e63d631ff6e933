"""Muon as an inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

Adjust = Literal["original", "match_rms_adamw", "dion", "none"]
Arithmetic = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Muon(Inner):
    """Muon (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024).

        M <- momentum M + (1 - momentum) R;  X = (1 - momentum) R + momentum M (Nesterov) or M
        value = NewtonSchulz(X), step = lr f(m, n)

    The iteration brings singular values near 1, not to 1. `f` is `sqrt(max(1, m/n))` ("original"),
    `0.2 sqrt(max(m, n))` ("match_rms_adamw"), `sqrt(m/n)` ("dion") or 1 ("none") for an m x n
    weight, whatever its coordinates. Vectors fall back to Adam with the same learning rate.

    Args:
        momentum: averaging rate; 0 keeps no state.
        nesterov: see above.
        steps: Newton-Schulz iterations.
        adjust: the factor f.
        coefficients: (a, b, c) of the iteration, see `subspan.linalg.newton_schulz`.
        eps: lower bound of the norm that X is divided by before the iteration.
        arithmetic: of the iteration; "float32" is float64 for float64 coordinates, "bfloat16" that
            of `torch.optim.Muon`.
        overwrites: whether coordinates are scratch memory, as those of a complement are; saves one
            matrix without Nesterov's step.
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    adjust: Adjust = "original"
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    arithmetic: Arithmetic = "float32"
    overwrites: bool = False

    needs_matrix: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        check_steps("ns_steps", self.steps)
        check_non_negative(eps=self.eps)
        if self.adjust not in get_args(Adjust):
            raise ValueError(f"adjust={self.adjust!r} must be {', '.join(get_args(Adjust))}")
        if len(self.coefficients) != 3:
            raise ValueError(f"ns_coefficients={self.coefficients!r} must be three numbers")
        if self.arithmetic not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.arithmetic!r} must be float32 or bfloat16")

    @property
    def first_moment(self) -> str | None:  # type: ignore[override]
        """The momentum buffer, if there is one."""
        return "momentum_buffer" if self.momentum else None

    @property
    def momentum_weight(self) -> float:
        """The momentum."""
        return self.momentum

    def shape_factor(self, layout: Layout) -> float:
        """f."""
        m, n = layout.matrix
        if self.adjust == "original":
            return max(1.0, m / n) ** 0.5
        if self.adjust == "match_rms_adamw":
            return 0.2 * max(m, n) ** 0.5
        return (m / n) ** 0.5 if self.adjust == "dion" else 1.0

    def fallback(self) -> Inner:
        """Adam, for vectors."""
        return Adam()

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One moment, or nothing without momentum."""
        return (StateDeclaration("momentum_buffer", "first_moment"),) if self.momentum else ()

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        ahead = coordinates
        if self.momentum:
            ahead = averaged_ahead(coordinates, state, self.momentum, self.nesterov, work)
        dtype = torch.bfloat16 if self.arithmetic == "bfloat16" else None
        settings = (self.steps, self.coefficients, self.eps, dtype)
        scratch = self.nesterov and self.momentum > 0  # else it is the state or the coordinates
        if self.overwrites and not scratch:
            ahead, scratch = coordinates.copy_(ahead), True
        value = linalg.newton_schulz(ahead, *settings, overwrite=scratch)
        return Direction(value.to(coordinates.dtype), lr)


def averaged_ahead(
    coordinates: Tensor, state: dict[str, Any], momentum: float, nesterov: bool, work: Workspace
) -> Tensor:
    """The average of past coordinates, or its Nesterov form.

        M <- momentum M + (1 - momentum) R;  (1 - momentum) R + momentum M, or M

    The Nesterov form is scratch memory; the average is the state itself.

    Args:
        coordinates: R.
        state: holds M as "momentum_buffer".
        momentum: averaging rate.
        nesterov: which of the two.
        work: scratch memory.
    """
    moment: Tensor = state["momentum_buffer"].lerp_(coordinates, 1.0 - momentum)
    if not nesterov:
        return moment
    return torch.lerp(coordinates, moment, momentum, out=work.like(coordinates))


def check_momentum(momentum: float) -> None:
    """Refuse an averaging rate outside [0, 1).

    Raises:
        ValueError: naming it.
    """
    if not isinstance(momentum, (int, float)) or not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum={momentum!r} must lie in [0, 1)")


def check_steps(name: str, steps: int) -> None:
    """Refuse a number of iterations that is no integer of at least 0.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{name}={steps!r} must be an integer of at least 0")
