"""A memory plan: its numbers, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from subspan.plan.settings import Settings
from subspan.plan.sharding import Shares

STATES = ("first_moment", "second_moment", "basis", "error", "scalar")
BASELINE = "AdamW in bfloat16 on the whole model, unsharded"


@dataclass(frozen=True)
class Peak:
    """The fullest moment of training, in bytes.

    Args:
        moment: "backward" (in the forward or backward pass) or "step" (in the optimizer's step).
        gradients: gradients that exist then.
        activations: activations, and temporaries of operators; with FSDP2 gathered weights too.
        temporary: what the optimizer's step allocates for a moment, at most.
        total: these, and weights and states.
    """

    moment: str
    gradients: int
    activations: int
    temporary: int
    total: int


@dataclass(frozen=True)
class Plan:
    """What training needs, in bytes per device.

    Exact are `weights`, `buffers`, `states` and `gradients` (on one device); estimates are
    `activations`, `temporary` and with them `peak`.

    Args:
        settings: what was planned.
        label: the model's short name.
        parameters: of the model, adapters aside.
        trained: values that are trained.
        weights: of all parameters.
        buffers: of tables that are neither weight nor state.
        states: optimizer states by kind.
        gradients: that exist at most at one time.
        activations: what autograd keeps when the forward pass ends; None if that is not known.
        temporary: what a step of the optimizer allocates at most.
        moments: total bytes at the fullest moment of the passes, and of the step.
        peak: the fuller of them; None without activations.
        shares: with FSDP2.
        notes: what the numbers have to be read with.
    """

    settings: Settings
    label: str
    parameters: int
    trained: int
    weights: int
    buffers: int
    states: dict[str, int]
    gradients: int
    activations: int | None
    temporary: int
    moments: dict[str, int]
    peak: Peak | None
    shares: Shares | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def state(self) -> int:
        """Bytes of all optimizer states, bases included."""
        return sum(self.states.values())

    @property
    def held(self) -> int:
        """Weights, gradients, states and bases."""
        return self.weights + self.gradients + self.state

    @property
    def needed(self) -> int:
        """The peak; where activations are not known, what is known."""
        return self.peak.total if self.peak is not None else self.held + self.buffers

    @property
    def baseline_state(self) -> int:
        """States of `BASELINE`: two values of two bytes per parameter."""
        return 4 * self.parameters

    @property
    def baseline_held(self) -> int:
        """Weights, gradients and states of `BASELINE`."""
        return 8 * self.parameters


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as what JSON can hold; see `docs/PLAN.md` for the fields."""
    settings, model = plan.settings, plan.settings.model
    peak = plan.peak
    return {
        "model": plan.label,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "method": settings.method,
        "options": dict(settings.options),
        "dtype": model.dtype,
        "attention": model.attention,
        "int8_weights": model.int8_weights,
        "adapter": model.adapter,
        "base_weights": model.base_weights,
        "sequence_length": model.sequence_length,
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "checkpointing": settings.checkpointing,
        "update_in_backward": settings.update_in_backward,
        "clip": settings.clip,
        "clipping": settings.clipping,
        "ranks": settings.ranks,
        "device": settings.device,
        "bytes": {
            "weights": plan.weights,
            "buffers": plan.buffers,
            "gradients": plan.gradients,
            **{kind: plan.states[kind] for kind in STATES if kind in plan.states},
            "states": plan.state,
            "activations_saved": plan.activations,
            "temporary": plan.temporary,
            "peak": peak.total if peak is not None else None,
        },
        "exact": ["weights", "buffers", "gradients", *plan.states, "states"],
        "peak": None if peak is None else vars(peak),
        "moments": plan.moments,
        "baseline": {
            "name": BASELINE,
            "states": plan.baseline_state,
            "weights_gradients_states": plan.baseline_held,
        },
        "fsdp": None if plan.shares is None else vars(plan.shares),
        "notes": list(plan.notes),
    }
