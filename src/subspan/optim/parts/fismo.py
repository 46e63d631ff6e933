"""FISMO as an inner optimizer: Muon in coordinates whitened by a Fisher matrix in two factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg.products import add_symmetric_product_
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.muon import check_momentum, check_steps
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration


@dataclass(frozen=True)
class FISMO(Inner):
    """FISMO (Xu, Yan, Zhang, 2026, arXiv 2601.21750), for m x n coordinates R.

        L = R Q^-1 R^T / n + damping tr(P)/m I;  P <- m/tr(.) sym(gamma P + (1 - gamma) L)
        S = R^T P^-1 R / m + damping tr(Q)/n I;  Q <- n/tr(.) sym(gamma Q + (1 - gamma) S)
        M <- momentum M + (1 - momentum) P^-1/2 R Q^-1/2;  value = P^-1/2 Polar(M) Q^-1/2

    from P = I, Q = I, M = 0. `Polar(U diag(s) V^T) = U V^T`; a direction that M lacks stays out.
    With gamma = 1 the factors never move, which is Muon without Nesterov's step and shape factor.

    Args:
        momentum: averaging rate of the whitened gradient.
        gamma: averaging rate of the factors.
        damping: see above; relative to the factors, whose mean eigenvalue is 1.
        polar: "svd" is exact, "newton_schulz" Muon's iteration.
        steps: Newton-Schulz iterations.
        every: steps between computations of the inverse roots; above 1 they are kept as state, and
            the factors are averaged with the latest of them in between.
    """

    momentum: float = 0.95
    gamma: float = 0.95
    damping: float = 0.1
    polar: Literal["svd", "newton_schulz"] = "newton_schulz"
    steps: int = 5
    every: int = 1

    needs_matrix: ClassVar[bool] = True
    first_moment = "momentum_buffer"

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        check_steps("ns_steps", self.steps)
        check_non_negative(damping=self.damping)
        if not isinstance(self.gamma, (int, float)) or not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma!r} must lie in [0, 1]")
        if self.polar not in ("svd", "newton_schulz"):
            raise ValueError(f"polar={self.polar!r} must be svd or newton_schulz")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"root_interval={self.every!r} must be an integer of at least 1")

    @property
    def momentum_weight(self) -> float:
        """The momentum."""
        return self.momentum

    def fallback(self) -> Inner:
        """Adam, for vectors."""
        return Adam()

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The moment, both factors, and their inverse roots if they are kept."""
        *lead, m, n = layout.coordinates
        names = ["factor", "root"] if self.every > 1 else ["factor"]
        squares = [
            StateDeclaration(
                f"{side}_{name}", "second_moment", (*lead, size, size), dtype="compute"
            )
            for name in names
            for side, size in (("left", m), ("right", n))
        ]
        return (StateDeclaration("momentum_buffer", "first_moment"), *squares)

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        m, n = coordinates.shape[-2:]
        left, right = state["left_factor"], state["right_factor"]
        if age == 1:
            for name in ("left_factor", "right_factor", "left_root", "right_root"):
                if name in state:
                    state[name].zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)
        # Q as it was when its root was taken; without kept roots that is the last step's.
        kept, due = self.every > 1, (age - 1) % self.every == 0
        old_root = state["right_root"] if kept else inverse_root(right)
        whitened = coordinates @ old_root
        self._average(left, whitened, n)
        left_root = inverse_root(left) if due else state["left_root"]
        whitened = linalg.product(left_root, coordinates, whitened)
        self._average(right, whitened.mT, m)
        right_root = inverse_root(right) if due else old_root
        if kept and due:
            state["left_root"].copy_(left_root)
            state["right_root"].copy_(right_root)
        ahead = whitened @ right_root
        del whitened  # its memory is needed below
        moment = state["momentum_buffer"].lerp_(ahead, 1.0 - self.momentum)
        if self.polar == "svd":
            turned = polar_factor(moment)
        else:
            turned = linalg.newton_schulz(ahead.copy_(moment), self.steps, overwrite=True)
        return Direction(linalg.product(left_root @ turned, right_root, turned), lr)

    def _average(self, factor: Tensor, whitened: Tensor, count: int) -> None:
        """Average the damped sample X X^T / count into a factor and bring its mean eigenvalue to 1.

        In place, without the sample. What `sym` would remove are rounding errors, which fade as
        the samples do.
        """
        size = factor.shape[-1]
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        damping = self.damping * diagonal.mean(-1, keepdim=True)
        weight = 1.0 - self.gamma
        add_symmetric_product_(factor, whitened, whitened.mT, alpha=weight / count, beta=self.gamma)
        diagonal.add_(damping, alpha=weight)
        factor.mul_(size / diagonal.sum(-1)[..., None, None])


def inverse_root(factor: Tensor) -> Tensor:
    """`A^-1/2` of symmetric positive definite matrices `(..., k, k)`.

    Eigenvalues below the rounding error of the largest are raised to it.
    """
    values, vectors = torch.linalg.eigh(factor)
    floor = values[..., -1:] * (factor.shape[-1] * torch.finfo(factor.dtype).eps)
    vectors.mul_(values.maximum(floor).pow_(-0.25).unsqueeze(-2))
    return add_symmetric_product_(torch.empty_like(vectors), vectors, vectors.mT, beta=0.0)


def polar_factor(x: Tensor) -> Tensor:
    """`U V^T` of `x = U diag(s) V^T`, `(..., m, n)`.

    Directions whose singular value is zero to rounding are left out, so zero stays zero.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    tiny = s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    return (u * (s > tiny).to(x.dtype).unsqueeze(-2)) @ vh
