"""SWATS as two inner optimizers: Adam that watches for its own end, and the SGD that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

State = dict[str, Any]

# Entries whose step, gradient and weight stay in the inner caches while the products are taken.
PIECE = {"cpu": 1 << 17, "other": 1 << 22}


@dataclass(frozen=True)
class WatchedAdam(Inner):
    """The Adam phase of SWATS (Keskar, Socher, 2017, arXiv 1712.07628).

    With p the step and g the gradient of the whole network, as vectors,

        rate = <p, p> / -<p, g>                                       if <p, g> is not 0
        average <- b2 average + (1 - b2) rate;  estimate = average / (1 - b2^k)

    after the k-th such rate, and once `|estimate - rate| < tolerance` and the estimate is positive,
    SGD takes over with it as the learning rate. The parameter then leaves the active parts of its
    composition for the idle ones, `ScaledMomentum`, and its moments are freed.

    Args:
        adam: the optimizer of this phase.
        tolerance: see above.
        relative_tolerance: its share of the estimate that is added to it.
        min_steps: rates seen before a switch; at least 2 are needed anyway.
        granularity: "network" decides for all parameters together, "tensor" for each alone.
    """

    adam: Adam = field(default_factory=Adam)
    tolerance: float = 1e-9
    relative_tolerance: float = 0.0
    min_steps: int = 2
    granularity: Literal["network", "tensor"] = "network"

    # The two products are sums, so a weight may be cut as an elementwise one.
    elementwise: ClassVar[bool] = True
    needs_exact_weights: ClassVar[bool] = True
    concludes: ClassVar[bool] = True
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"

    def __post_init__(self) -> None:
        check_non_negative(
            switch_tolerance=self.tolerance, relative_tolerance=self.relative_tolerance
        )
        if not isinstance(self.min_steps, int) or isinstance(self.min_steps, bool):
            raise ValueError(f"min_steps={self.min_steps!r} must be an integer")
        if self.granularity not in ("network", "tensor"):
            raise ValueError(f"granularity={self.granularity!r} must be network or tensor")

    @property
    def decay(self) -> Literal["before", "after"]:  # type: ignore[override]
        """As Adam's."""
        return self.adam.decay

    @property
    def momentum_weight(self) -> float:
        """b1."""
        return self.adam.momentum_weight

    def momentum_correction(self, age: int) -> float:
        """As Adam's."""
        return self.adam.momentum_correction(age)

    def variance_correction(self, age: int) -> float:
        """As Adam's."""
        return self.adam.variance_correction(age)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Adam's moments, and the two products of the latest step."""
        return (
            *self.adam.declare(layout),
            StateDeclaration("step_sq", "scalar", "scalar"),
            StateDeclaration("step_along_gradient", "scalar", "scalar"),
        )

    def counters(self, layout: Layout) -> State:
        """The average of the rates, how many it has, and the learning rate of the latest step."""
        return {"rate_average": 0.0, "rates": 0, "latest_lr": 0.0}

    def update(
        self, coordinates: Tensor, state: State, age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        direction = self.adam.update(coordinates, state, age, lr, work)
        step, value, gradient = direction.step, direction.value.reshape(-1), coordinates.reshape(-1)
        # What is updated entry by entry never comes in batches.
        state["step_sq"].add_(torch.dot(value, value) * (step * step))
        state["step_along_gradient"].add_(torch.dot(value, gradient) * step)
        _note_lr(state, float(lr))
        return direction

    def can_step_weights(self, age: int) -> bool:
        """Always."""
        return True

    def step_weights(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        age: int,
        lr: float,
        weight_decay: float,
        rate: float | None = None,
    ) -> None:
        """See `Inner.step_weights`; one piece after the other goes through the whole step."""
        rate, keep = lr if rate is None else rate, 1.0 - lr * weight_decay
        gain = keep if self.decay == "after" else 1.0
        length = PIECE.get(weights[0].device.type, PIECE["other"])
        scratch = weights[0].new_empty(min(length, max(w.numel() for w in weights)))
        for weight, gradient, state in zip(weights, gradients, states, strict=True):
            step_sq, along = state["step_sq"], state["step_along_gradient"]
            whole = (weight, gradient, state["exp_avg"], state["exp_avg_sq"])
            for w, g, *moments in zip(*(_flat(x).split(length) for x in whole), strict=True):
                # Adam's step from a weight of zero is p itself.
                p = scratch[: w.numel()].zero_()
                own = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
                self.adam.step_weights([p], [g], [own], age, rate, 0.0)
                step_sq += torch.dot(p, p)
                along -= torch.dot(p, g)
                if weight_decay:
                    w.mul_(keep)
                w.add_(p, alpha=gain)
            _note_lr(state, rate)

    def conclude(self, states: list[State]) -> None:
        """Average the new rates, and switch where they have settled.

        Waits for the device once per step, until the switch.
        """
        watched = [state for state in states if "rates" in state]
        if not watched:
            return
        if self.granularity == "tensor":
            for state, totals in zip(watched, _products(watched), strict=True):
                self._judge([state], *totals)
            return
        switched = next((state["sgd_lr"] for state in states if "sgd_lr" in state), None)
        if switched is not None:  # parameters that join after the network has switched
            _switch(watched, switched)
            return
        squares, along = zip(*_products(watched), strict=True)
        self._judge(watched, math.fsum(squares), math.fsum(along))

    def _judge(self, states: list[State], step_sq: float, step_along_gradient: float) -> None:
        """One decision for parameters that are seen as one vector."""
        if not step_sq or not step_along_gradient:
            return
        rate, beta = step_sq / step_along_gradient, self.adam.betas[1]
        if not math.isfinite(rate):
            return
        longest = max(states, key=lambda state: state["rates"])
        count = longest["rates"] + 1
        average = beta * longest["rate_average"] + (1.0 - beta) * rate
        estimate = average / (1.0 - beta**count)
        for state in states:
            state.update(rate_average=average, rates=count)
        allowed = self.tolerance + self.relative_tolerance * abs(estimate)
        settled = abs(estimate - rate) < allowed and estimate > 0.0
        if settled and count >= max(2, self.min_steps):
            _switch(states, estimate)


@dataclass(frozen=True)
class ScaledMomentum(Inner):
    """The SGD phase of SWATS.

        M <- momentum M + R;  value = (1 - momentum) M, step = sgd_lr lr / (lr at the switch)

    A learning rate schedule acts on both phases alike.

    Args:
        momentum: b1 of the Adam phase.
    """

    momentum: float = 0.9

    elementwise: ClassVar[bool] = True
    needs_exact_weights: ClassVar[bool] = True
    first_moment = "momentum_buffer"

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One moment."""
        return (StateDeclaration("momentum_buffer", "first_moment"),)

    @property
    def momentum_weight(self) -> float:
        """The momentum."""
        return self.momentum

    def update(
        self, coordinates: Tensor, state: State, age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        moment = state["momentum_buffer"].mul_(self.momentum).add_(coordinates)
        step = lr * (1.0 - self.momentum) * state["sgd_lr"][0] / state["lr_at_switch"][0]
        return Direction(work.like(coordinates).copy_(moment), step)


def _flat(x: Tensor) -> Tensor:
    """All entries in the order of memory, which is alike in weight, gradient and moments."""
    return x.as_strided((x.numel(),), (1,))


def _note_lr(state: State, lr: float) -> None:
    """Keep the learning rate; states of a bucket have one for each of its parameters."""
    several = isinstance(state["latest_lr"], list)
    state["latest_lr"] = [lr] * len(state["latest_lr"]) if several else lr


def _products(states: list[State]) -> list[tuple[float, float]]:
    """<p, p> and -<p, g> of every parameter, in one transfer; the sums start again from zero."""
    device = states[0]["step_sq"].device
    rows = [
        torch.stack([state["step_sq"].sum(), state["step_along_gradient"].sum()])
        for state in states
    ]
    found = torch.stack([row.to(device, torch.float64, non_blocking=True) for row in rows])
    for state in states:
        state["step_sq"].zero_()
        state["step_along_gradient"].zero_()
    return [(float(step_sq), float(along)) for step_sq, along in found.tolist()]


def _switch(states: list[State], sgd_lr: float) -> None:
    """Leave the Adam phase: only step counts and learning rates stay.

    Where the learning rate is 0 at the moment there is nothing to be proportional to: such
    parameters follow later.
    """
    for state in states:
        lr = state["latest_lr"]
        if lr:
            step = state["step"]
            state.clear()
            state.update(active=0, kept_step=step, sgd_lr=sgd_lr, lr_at_switch=lr)
