"""AuON and Hybrid-AuON as an inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.muon import averaged_ahead, check_momentum, check_steps
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

# Entries of which the hyperbolic cosine is taken at once.
PIECE = 1 << 16


@dataclass(frozen=True)
class AuON(Inner):
    """AuON (Maity, 2025, arXiv 2509.24320); with `steps` > 0 Hybrid-AuON.

        M <- momentum M + (1 - momentum) R;  X = (1 - momentum) R + momentum M
        X <- NewtonSchulz(X) with `steps` iterations;  Z = X / (||X||_F + 1e-7)
        value = Z / (rms(cosh(Z)) + 1e-8), step = lr sqrt(max(1, m/n))     the paper
        value = X / (rms(cosh(gamma Z)) + 1e-8), step = lr                 the released code

    Every entry of Z is far below 1, so rms(cosh(gamma Z)) = 1 + O(gamma² / (mn)): the paper's form
    is, to that order, normalised SGD with momentum, and the released one is SGD with averaged
    Nesterov momentum (for 48 x 80 and gamma 1.5 the divisor exceeds 1 by less than 6e-4).

    Args:
        momentum: averaging rate.
        steps: Newton-Schulz iterations, 0 for AuON itself.
        gamma: see above; only the released form has it.
        as_released: which of the two forms.
    """

    momentum: float = 0.95
    steps: int = 0
    gamma: float = 1.5
    as_released: bool = False

    needs_matrix: ClassVar[bool] = True
    first_moment = "momentum_buffer"

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        check_steps("ns_steps", self.steps)
        check_non_negative(gamma=self.gamma)

    @property
    def momentum_weight(self) -> float:
        """The momentum."""
        return self.momentum

    def shape_factor(self, layout: Layout) -> float:
        """See the class."""
        m, n = layout.matrix
        return 1.0 if self.as_released else max(1.0, m / n) ** 0.5

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
        value = averaged_ahead(coordinates, state, self.momentum, True, work)
        if self.steps:
            value = linalg.newton_schulz(value, self.steps, overwrite=True)
        norm = torch.linalg.vector_norm(value, dim=(-2, -1), keepdim=True).add_(1e-7)
        scale = norm.reciprocal()
        gamma = self.gamma if self.as_released else 1.0
        factor = _rms_cosh(value, gamma * scale).add_(1e-8).reciprocal_()
        if not self.as_released:
            factor.mul_(scale)
        return Direction(value.mul_(factor), lr)


def _rms_cosh(x: Tensor, factor: Tensor) -> Tensor:
    """Root mean square of `cosh(factor x)` over each matrix, `(..., 1, 1)`.

    `cosh² z = 1/2 + (exp 2z + exp -2z) / 4` takes a third of the time of the hyperbolic cosine. A
    few pieces need no temporary of the size of `x`.
    """
    m, n = x.shape[-2:]
    total = torch.zeros_like(factor)
    for piece in x.split(max(1, PIECE // n), dim=-2):
        grown = torch.mul(piece, 2.0 * factor).exp_()
        total += grown.sum((-2, -1), keepdim=True)
        total += grown.reciprocal_().sum((-2, -1), keepdim=True)
    return total.div_(4 * m * n).add_(0.5).sqrt_()
