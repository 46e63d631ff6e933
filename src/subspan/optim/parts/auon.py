"""AuON and Hybrid-AuON as an inner optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.muon import averaged_ahead, check_momentum, check_steps
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

# Entries that go through all elementwise operations at once, in the inner caches of a CPU.
PIECE = {"cpu": 1 << 17, "other": 1 << 22}
# By how many roundings the mean square may be off, twice the divisor's: 8e-6 of it in float32.
_ROUNDINGS = 128


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
        if self.steps or coordinates.dim() > 2:
            value = averaged_ahead(coordinates, state, self.momentum, True, work)
            if self.steps:
                value = linalg.newton_schulz(value, self.steps, overwrite=True)
            length = torch.linalg.vector_norm(value, dim=(-2, -1), keepdim=True)
        else:
            value, length = self._ahead(coordinates, state["momentum_buffer"], work)
        norm = length + 1e-7
        divisor = _rms_cosh(value, length, norm, self.gamma if self.as_released else 1.0).add_(1e-8)
        if not self.as_released:
            divisor.mul_(norm)
        if value.device.type == "cpu" and divisor.numel() == 1:
            # A number joins the addition to the weight; a tensor would take a pass of its own.
            return Direction(value, lr / divisor.item())
        return Direction(value.div_(divisor), lr)

    def _ahead(self, coordinates: Tensor, moment: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
        """`averaged_ahead` of one matrix and its norm, in one pass."""
        value = work.like(coordinates)
        square = value.new_zeros(1, 1)
        rows = max(1, _piece(value) // value.shape[-1])
        parts = (tensor.split(rows) for tensor in (coordinates, moment, value))
        for r, m, x in zip(*parts, strict=True):
            m.lerp_(r, 1.0 - self.momentum)
            flat = torch.lerp(r, m, self.momentum, out=x).view(-1)
            square += torch.dot(flat, flat)
        return value, square.sqrt_()


def _piece(x: Tensor) -> int:
    return PIECE.get(x.device.type, PIECE["other"])


def _rms_cosh(x: Tensor, length: Tensor, norm: Tensor, gamma: float) -> Tensor:
    """Root mean square of `cosh(gamma x / norm)` over each matrix, `(..., 1, 1)`.

    With z of norm gamma at most, it is the root of

        1 + (sum z² + sum (cosh² z - 1 - z²)) / (mn)

    whose last sum, z⁴/3 and smaller terms, is largest when all but one entry are zero. Where even
    that is no more than `_ROUNDINGS`, it is left out, without a pass over x: for gamma = 1.5 from
    150 000 entries in float32, of which it would be 1e-10 if they were alike in size. Elsewhere
    `cosh² z = 1/2 + (exp 2z + exp -2z) / 4`, in a third of the time of the hyperbolic cosine.

    Args:
        x: `(..., m, n)`.
        length: its Frobenius norm, `(..., 1, 1)`.
        norm: what it is divided by, at least the length.
        gamma: see above.
    """
    m, n = x.shape[-2:]
    largest = math.cosh(min(gamma, 99.0)) ** 2 - 1.0 - gamma**2
    if largest < _ROUNDINGS * torch.finfo(x.dtype).eps * m * n:
        return (length / norm).mul_(gamma).square_().div_(m * n).add_(1.0).sqrt_()
    factor, total = 2.0 * gamma / norm, torch.zeros_like(norm)
    for piece in x.split(max(1, _piece(x) // n), dim=-2):
        grown = torch.mul(piece, factor).exp_()
        total += grown.sum((-2, -1), keepdim=True)
        total += grown.reciprocal_().sum((-2, -1), keepdim=True)
    return total.div_(4 * m * n).add_(0.5).sqrt_()
