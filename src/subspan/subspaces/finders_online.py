"""Online PCA: a basis that an optimizer of its own improves at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from subspan import linalg
from subspan.subspaces.bases import Dense, Subspace
from subspan.subspaces.finder import Finder, OneSide, Sight
from subspan.subspaces.layout import Layout, StateDeclaration

State = dict[str, Any]
Number = float | Tensor


def pca_slope(
    basis: Tensor, gradient: Tensor, coordinates: Tensor, side: OneSide, penalty: float = 0.0
) -> Tensor:
    """The derivative of the online PCA loss with respect to the basis P.

        loss = ||P Pᵀ g - g||_F² + penalty ||Pᵀ P - I||_F²,  g = G / ||G||_F

    on the left; on the right with Gᵀ. With c = Pᵀ g and A = g cᵀ = g gᵀ P it is

        2 [P (Pᵀ A + 2 penalty (Pᵀ P - I)) + A (Pᵀ P - 2 I)],

    one product with the gradient and some with thin matrices; P need not be orthonormal.

    Args:
        basis: P, (..., d, r).
        gradient: G, (..., m, n). A zero one has no PCA loss.
        coordinates: Pᵀ G, (..., r, n), or G P, (..., m, r), on the right.
        side: of the basis.
        penalty: see above.

    Returns:
        (..., d, r).
    """
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
    scale = torch.where(norm > 0, norm.reciprocal(), 0.0)
    inside = coordinates * scale
    energies = gradient @ inside.mT if side == "left" else gradient.mT @ inside
    energies.mul_(scale)
    both = torch.cat([basis, energies], dim=-1)
    gram, weights = (basis.mT @ both).tensor_split(2, dim=-1)
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    if penalty:
        weights = weights + 2.0 * penalty * (gram - identity)
    return (both @ torch.cat([weights, gram - 2.0 * identity], dim=-2)).mul_(2.0)


class BasisOptimizer(Protocol):
    """What moves a basis, given the derivative of a loss."""

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The state it keeps for a parameter of that layout."""

    def step(self, basis: Tensor, slope: Tensor, state: State, age: Number, lr: float) -> None:
        """Move the basis in place; `age` counts its steps, 1-based (a tensor where they differ)."""


@dataclass(frozen=True)
class AdamWStep:
    """AdamW with the defaults of `torch.optim.AdamW`.

    Args:
        betas: averaging rates.
        eps: added to the root of the corrected second moment.
        weight_decay: `P <- P (1 - lr weight_decay)` before the step.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Two moments."""
        return (
            StateDeclaration("basis_exp_avg", "first_moment", "basis"),
            StateDeclaration("basis_exp_avg_sq", "second_moment", "basis"),
        )

    def step(self, basis: Tensor, slope: Tensor, state: State, age: Number, lr: float) -> None:
        """See `BasisOptimizer`."""
        b1, b2 = self.betas
        mean = state["basis_exp_avg"].lerp_(slope, 1.0 - b1)
        spread = state["basis_exp_avg_sq"].mul_(b2).addcmul_(slope, slope, value=1.0 - b2)
        root = (spread / (1.0 - b2**age)).sqrt_().add_(self.eps)
        basis.mul_(1.0 - lr * self.weight_decay)
        basis.sub_((mean / root).mul_(lr / (1.0 - b1**age)))


@dataclass(frozen=True)
class SGDStep:
    """Gradient descent without state."""

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Nothing."""
        return ()

    def step(self, basis: Tensor, slope: Tensor, state: State, age: Number, lr: float) -> None:
        """See `BasisOptimizer`."""
        basis.sub_(slope, alpha=lr)


@dataclass(frozen=True)
class LionStep:
    """Lion (Chen et al. 2023, arXiv 2302.06675): `P <- P - lr sign(b1 M + (1 - b1) D)`.

    Args:
        betas: b1, and the averaging rate of M.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One moment."""
        return (StateDeclaration("basis_exp_avg", "first_moment", "basis"),)

    def step(self, basis: Tensor, slope: Tensor, state: State, age: Number, lr: float) -> None:
        """See `BasisOptimizer`."""
        moment = state["basis_exp_avg"]
        basis.sub_(torch.lerp(moment, slope, 1.0 - self.betas[0]).sign_(), alpha=lr)
        moment.lerp_(slope, 1.0 - self.betas[1])


@dataclass(frozen=True)
class AdafactorStep:
    """Adafactor (Shazeer, Stern 2018, arXiv 1804.04235) with a given learning rate, no momentum.

    Args:
        eps: added to the squares.
        clip_threshold: largest root mean square of the step before the learning rate.
        decay_rate: the averaging rate is `1 - t**decay_rate`.
    """

    eps: float = 1e-30
    clip_threshold: float = 1.0
    decay_rate: float = -0.8

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Row and column means of the squares."""
        *lead, d, r = layout.shape("basis")
        return (
            StateDeclaration("basis_exp_avg_sq_row", "second_moment", (*lead, d)),
            StateDeclaration("basis_exp_avg_sq_col", "second_moment", (*lead, r)),
        )

    def step(self, basis: Tensor, slope: Tensor, state: State, age: Number, lr: float) -> None:
        """See `BasisOptimizer`."""
        share = age**self.decay_rate
        row, column = state["basis_exp_avg_sq_row"], state["basis_exp_avg_sq_col"]
        squares = slope.square().add_(self.eps)
        share = share.squeeze(-1) if isinstance(share, Tensor) else share
        row.lerp_(squares.mean(-1), share)
        column.lerp_(squares.mean(-2), share)
        value = slope * (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        value.mul_(column.rsqrt().unsqueeze(-2))
        count = math.sqrt(value.shape[-2] * value.shape[-1])
        rms = torch.linalg.vector_norm(value, dim=(-2, -1), keepdim=True).div_(count)
        basis.sub_(value.div_((rms / self.clip_threshold).clamp_(min=1.0)), alpha=lr)


@dataclass(frozen=True)
class OnlinePCA(Finder):
    """A basis trained on the online PCA loss, one optimizer step after every step of the weights.

    The first one holds the gradient's leading singular vectors; from then on P follows `pca_slope`
    and is not kept orthonormal. Liang et al.: Memory-Efficient LLM Training with Online Subspace
    Descent, 2024, arXiv 2408.12857.

    Args:
        optimizer: what moves P.
        lr: its learning rate at the first learning rate of the weights, with which it varies.
        penalty: of the distance from orthonormal columns, see `pca_slope`.

    Raises:
        ValueError: `lr` or `penalty` is negative.
    """

    optimizer: BasisOptimizer = field(default_factory=AdamWStep)
    lr: float = 1 / 200
    penalty: float = 0.0
    orthonormal = False
    follows = True
    supports_both_sides = False

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("penalty", self.penalty)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0")

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        return (*super().declare(layout), *self.optimizer.declare(layout))

    def find(self, sight: Sight) -> Subspace:
        side = sight.layout.one_side
        for declared in self.optimizer.declare(sight.layout):
            sight.state[declared.name].zero_()
        found = linalg.top_basis(sight.gradient, sight.layout.rank, side=side)
        return Dense(side, found, orthonormal=False)

    def follow(self, sight: Sight) -> Subspace:
        previous = sight.previous
        assert isinstance(previous, Dense)
        # 0: found in this step, or put off because the gradient is still zero.
        ages = [sight.step - found if found else 0 for found in sight.state["refreshed"]]
        if not all(ages):
            return previous
        side, basis = sight.layout.one_side, previous.basis
        coordinates = sight.coordinates
        if coordinates is None:
            coordinates = previous.project(sight.gradient)
        slope = pca_slope(basis, sight.gradient, coordinates, side, self.penalty)
        age: Number = float(ages[0])
        if len(set(ages)) > 1:
            age = torch.tensor(ages, dtype=basis.dtype, device=basis.device)
            age = age.view(-1, *[1] * (basis.dim() - 1))
        self.optimizer.step(basis, slope, sight.state, age, self.lr * sight.lr_ratio)
        return previous
