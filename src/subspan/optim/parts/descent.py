"""Inner optimizers of one moment or none: SGD, sign descent, Lion, averaged momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.parts.inner import Direction, Inner, Rate, check_betas, check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

Start = Literal["zero", "gradient", "parameter"]

# Entries whose signs are held at once.
PIECE = {"cpu": 1 << 17, "other": 1 << 22}


@dataclass(frozen=True)
class SGD(Inner):
    """Stochastic gradient descent with (heavy-ball or Nesterov) momentum.

        M <- momentum M + (1 - dampening) R

    Args:
        momentum: 0 keeps no state.
        dampening: see above; not applied to the first gradient, as in torch.optim.SGD.
        nesterov: step along `R + momentum M`.
        start: "zero" is the usual first step `M = R`. The FRUGAL code starts the buffer as a copy
            of the first gradient ("gradient": the first step is `(1 + momentum) R`), for
            unprojected tensors as a copy of the weight ("parameter").
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    start: Start = "zero"

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_non_negative(momentum=self.momentum, dampening=self.dampening)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")

    @property
    def first_moment(self) -> str | None:  # type: ignore[override]
        """The momentum buffer, if there is one."""
        return "momentum_buffer" if self.momentum else None

    @property
    def momentum_weight(self) -> float:
        """The momentum."""
        return self.momentum

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One buffer, or nothing without momentum."""
        fill: float | Literal["parameter"] = "parameter" if self.start == "parameter" else 0.0
        return (
            (StateDeclaration("momentum_buffer", "first_moment", fill=fill),)
            if self.momentum
            else ()
        )

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        value = work.like(coordinates)
        if not self.momentum:
            return Direction(value.copy_(coordinates), lr)
        buffer = state["momentum_buffer"]
        if age == 1 and self.start != "parameter":
            buffer.copy_(coordinates)
            if self.start == "gradient":
                buffer.mul_(self.momentum).add_(coordinates, alpha=1.0 - self.dampening)
        else:
            buffer.mul_(self.momentum).add_(coordinates, alpha=1.0 - self.dampening)
        value.copy_(buffer)
        if self.nesterov:
            value.mul_(self.momentum).add_(coordinates)
        return Direction(value, lr)

    def can_step_weights(self, age: int) -> bool:
        """Unless the first step is one of the unusual ones."""
        return age > 1 or self.start == "zero" or not self.momentum

    def step_weights(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        age: int,
        lr: float,
        weight_decay: float,
        rate: float | None = None,
    ) -> None:
        """See `Inner.step_weights`."""
        if weight_decay:
            torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
        torch._fused_sgd_(
            weights,
            gradients,
            [state["momentum_buffer"] for state in states] if self.momentum else [],
            weight_decay=0.0,
            momentum=self.momentum,
            lr=lr if rate is None else rate,
            dampening=self.dampening,
            nesterov=self.nesterov,
            maximize=False,
            is_first_step=age == 1,
        )


@dataclass(frozen=True)
class Lion(Inner):
    """Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv 2302.06675).

    value = sign(b1 M + (1 - b1) R),  M <- b2 M + (1 - b2) R

    Args:
        betas: see above.
        signed: False leaves the sign to an output that takes it in full size.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    signed: bool = True

    elementwise: ClassVar[bool] = True
    first_moment = "exp_avg"

    def __post_init__(self) -> None:
        check_betas(self.betas)

    @property
    def momentum_weight(self) -> float:
        """b2, the rate at which the moment forgets."""
        return self.betas[1]

    def momentum_correction(self, age: int) -> float:
        """1 / (1 - b2^age)."""
        return 1.0 / (1.0 - self.betas[1] ** age)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One moment."""
        return (StateDeclaration("exp_avg", "first_moment"),)

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        moment = state["exp_avg"]
        value = torch.mul(moment, self.betas[0], out=work.like(coordinates))
        value.add_(coordinates, alpha=1.0 - self.betas[0])
        value = value.sign_() if self.signed else value
        moment.mul_(self.betas[1]).add_(coordinates, alpha=1.0 - self.betas[1])
        return Direction(value, lr)


@dataclass(frozen=True)
class SignDescent(Inner):
    """`W <- W - lr sign(R)` without state (signSGD; FRUGAL's rule for what has none).

    Bernstein et al. 2018, arXiv 1802.04434.
    """

    elementwise: ClassVar[bool] = True

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """No state."""
        return ()

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        return Direction(torch.sign(coordinates, out=work.like(coordinates)), lr)

    def can_step_weights(self, age: int) -> bool:
        """Always."""
        return True

    def step_weights(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        age: int,
        lr: float,
        weight_decay: float,
        rate: float | None = None,
    ) -> None:
        """See `Inner.step_weights`; piece by piece, so that the signs stay in the cache."""
        step = lr if rate is None else rate
        length = PIECE.get(weights[0].device.type, PIECE["other"])
        scratch = weights[0].new_empty(min(length, max(w.numel() for w in weights)))
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight_decay:
                weight.mul_(1.0 - lr * weight_decay)
            if not weight.is_contiguous():
                weight.sub_(gradient.sign(), alpha=step)
                continue
            pairs = (tensor.view(-1).split(length) for tensor in (weight, gradient))
            for w, g in zip(*pairs, strict=True):
                w.sub_(torch.sign(g, out=scratch[: g.numel()]), alpha=step)


@dataclass(frozen=True)
class AverageMomentum(Inner):
    """Flora's momentum: an exponential moving average, stepped along the new average.

        M <- b M + (1 - b) R

    Args:
        beta: averaging rate.
        beta2: if given, the step is multiplied with Adam's corrections,
            `sqrt(1 - beta2^t) / (1 - b^t)`, for a normaliser that divides by a second moment with
            that rate (Subset-Norm). The decay then comes after the step, as in that code.
    """

    beta: float = 0.9
    beta2: float | None = None

    elementwise: ClassVar[bool] = True
    first_moment = "exp_avg"

    def __post_init__(self) -> None:
        check_betas((self.beta, 0.0))

    @property
    def momentum_weight(self) -> float:
        """b."""
        return self.beta

    @property
    def decay(self) -> Literal["before", "after"]:  # type: ignore[override]
        """Whether weight decay comes before or after the step."""
        return "before" if self.beta2 is None else "after"

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One moment."""
        return (StateDeclaration("exp_avg", "first_moment"),)

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        moment = state["exp_avg"].lerp_(coordinates, 1.0 - self.beta)
        step = lr
        if self.beta2 is not None:
            step = lr * (math.sqrt(1.0 - self.beta2**age) / (1.0 - self.beta**age))
        return Direction(moment, step, scratch=False)
