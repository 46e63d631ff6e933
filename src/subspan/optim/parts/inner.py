"""Inner optimizers: what runs on coordinates, or on the whole gradient without a subspace.

Every inner optimizer turns coordinates `(...)` into a `Direction`: the weight moves by
`-step * value`, lifted to full size. Moments are updated in place. Weight decay is always decoupled
(`W <- W (1 - lr * weight_decay)`); an inner optimizer only says whether it comes before or after
the step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

Rate = float | Tensor


@dataclass
class Direction:
    """Minus the change of the coordinates, as `step * value`.

    Args:
        value: same shape as the coordinates; memory that the caller may overwrite.
        step: step size; a number, or a tensor broadcastable to `(..., m, n)` when it depends on the
            weight.
        scratch: False if the value is a moment itself, which must not be overwritten.
    """

    value: Tensor
    step: Rate
    scratch: bool = True


class Inner:
    """Base of all inner optimizers.

    - elementwise: a coordinate's step depends on that coordinate alone.
    - needs_matrix: coordinates must be matrices; vectors go to `fallback()`.
    - needs_exact_weights: cannot train weights that are rounded to int8 after every step.
    - concludes: `conclude` is called after every step with the states of all parameters that took
      part, of all param groups with an equal inner optimizer. It may set "active" to 0 in some,
      which hands the parameter over to its composition's idle parts.
    """

    elementwise: ClassVar[bool] = False
    needs_matrix: ClassVar[bool] = False
    needs_exact_weights: ClassVar[bool] = False
    concludes: ClassVar[bool] = False
    decay: Literal["before", "after"] = "before"
    first_moment: str | None = None
    second_moment: str | None = None

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The state kept for a parameter of that layout."""
        raise TypeError(f"{type(self).__name__} does not define declare()")

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """One step. `age` counts the steps since the moments started, 1-based."""
        raise TypeError(f"{type(self).__name__} does not define update()")

    def counters(self, layout: Layout) -> dict[str, Any]:
        """Numbers kept next to the declared tensors, and their start."""
        return {}

    def check(self, layout: Layout) -> None:
        """Refuse a parameter that it cannot treat."""

    def claims(self, name: str | None) -> bool | None:
        """Whether it is for the parameter of that name; None leaves that to the usual rules."""
        return None

    def names(self) -> Collection[str]:
        """The names of parameters that its settings speak of; all of them must exist."""
        return ()

    def can_step_weights(self, age: int) -> bool:
        """Whether `step_weights` takes the step of that age."""
        return False

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
        """Update whole weights in place with one fused kernel call.

        All tensors share dtype and device. `rate` replaces `lr` in the step, not in the decay.
        """
        raise TypeError(f"{type(self).__name__} has no fused kernel")

    def conclude(self, states: list[dict[str, Any]]) -> None:
        """Draw conclusions from the states of all parameters that took part in a step."""

    def shape_factor(self, layout: Layout) -> float:
        """Factor on the learning rate that depends on the shape of the weight."""
        return 1.0

    def momentum_correction(self, age: int) -> float:
        """What the first moment is multiplied with to be an unbiased average after `age` steps."""
        return 1.0

    def variance_correction(self, age: int) -> float:
        """The same for the second moment."""
        return 1.0

    @property
    def momentum_weight(self) -> float:
        """The decay rate of the first moment."""
        return 0.0

    def fallback(self) -> Inner:
        """The inner optimizer for what this one cannot treat (vectors, for matrix methods)."""
        return self


def check_betas(betas: Sequence[float]) -> None:
    """Refuse averaging rates outside [0, 1).

    Raises:
        ValueError: naming `betas` and what is allowed.
    """
    ok = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not ok or not all(isinstance(b, (int, float)) and 0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1)")


def check_non_negative(**values: float) -> None:
    """Refuse negative or non-finite hyper-parameters.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}={value!r} must be a finite number of at least 0")


Convention = Literal["hf", "torch", "bitsandbytes"]
_CONVENTIONS = ("hf", "torch", "bitsandbytes")


@dataclass(frozen=True)
class Adam(Inner):
    """Adam with decoupled weight decay.

    Kingma, Ba 2014, arXiv 1412.6980; Loshchilov, Hutter 2017, arXiv 1711.05101.

        M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R∘R,  value = M / (sqrt(V) + e)

    with step `lr * sqrt(1 - b2^t) / (1 - b1^t)`. The published codes differ in three conventions:

    - "hf": e = eps, added before the bias correction; decay after the step (GaLore, Fira, APOLLO).
    - "torch": e = eps * sqrt(1 - b2^t), i.e. eps is added after the correction; decay before the
      step.
    - "bitsandbytes": eps as "torch", decay after the step (8-bit GaLore's projected matrices; its
      plain ones are "torch").

    Args:
        betas: averaging rates of the two moments.
        eps: added to the root of the second moment.
        convention: one of the above.
        correct_bias: False drops both bias corrections.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    convention: Convention = "torch"
    correct_bias: bool = True

    elementwise: ClassVar[bool] = True
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_non_negative(eps=self.eps)
        if self.convention not in _CONVENTIONS:
            raise ValueError(
                f"convention={self.convention!r} is not known: use {', '.join(_CONVENTIONS)}"
            )

    @property
    def decay(self) -> Literal["before", "after"]:  # type: ignore[override]
        """Whether weight decay comes before or after the step."""
        return "before" if self.convention == "torch" else "after"

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Two moments in the shape of the coordinates."""
        return (
            StateDeclaration("exp_avg", "first_moment"),
            StateDeclaration("exp_avg_sq", "second_moment"),
        )

    @property
    def momentum_weight(self) -> float:
        """b1."""
        return self.betas[0]

    def momentum_correction(self, age: int) -> float:
        """1 / (1 - b1^age)."""
        return 1.0 / (1.0 - self.betas[0] ** age)

    def variance_correction(self, age: int) -> float:
        """1 / (1 - b2^age)."""
        return 1.0 / (1.0 - self.betas[1] ** age)

    def _scalars(self, age: int, lr: Rate) -> tuple[Rate, float]:
        """Step size and effective eps at that age."""
        if not self.correct_bias:
            return lr, self.eps
        root = math.sqrt(1.0 - self.betas[1] ** age)
        eps = self.eps if self.convention == "hf" else self.eps * root
        return lr * (root * self.momentum_correction(age)), eps

    def can_step_weights(self, age: int) -> bool:
        """Always."""
        return True

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        step, eps = self._scalars(age, lr)
        value = work.like(coordinates).zero_()
        # A unit step on a zero weight is minus the direction: one fused pass over the moments.
        moments = state["exp_avg"], state["exp_avg_sq"]
        given = [coordinates.contiguous()]
        adam_kernel([value], given, [moments[0]], [moments[1]], self.betas, -1.0, 0.0, eps)
        return Direction(value, step)

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
        step, eps = self._scalars(age, lr if rate is None else rate)
        shrink = lr * weight_decay
        if self.decay == "after":
            # (W - s N)(1 - d) = W (1 - d) - s (1 - d) N
            step = step * (1.0 - shrink)
        exp_avg = [state["exp_avg"] for state in states]
        exp_avg_sq = [state["exp_avg_sq"] for state in states]
        adam_kernel(weights, gradients, exp_avg, exp_avg_sq, self.betas, float(step), shrink, eps)


def adam_kernel(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    betas: tuple[float, float],
    step: float,
    shrink: float,
    eps: float,
) -> None:
    """`W <- (1 - shrink) W - step M / (sqrt(V) + eps)` with new averages, in one fused pass.

    All tensors share dtype and device; those of a weight share their strides.
    """
    # At an infinite step count the kernel's own bias corrections are exactly 1, which leaves
    # the conventions to us. The kernel decays by lr * weight_decay before it steps.
    endless = torch.full((), math.inf, device=weights[0].device)
    torch._fused_adamw_(
        weights,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        [endless] * len(weights),
        lr=step,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=shrink / step if shrink else 0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
