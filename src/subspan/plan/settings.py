"""What is planned: a model, a method and the way of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from subspan.plan.model import ModelSpec
from subspan.train.errors import JobError

Checkpointing = Literal["none", "full"]


@dataclass(frozen=True)
class Settings:
    """One way of training one model; names as in `subspan.train.config.TrainConfig`.

    Args:
        model: the model.
        method: registered name.
        options: hyper-parameters of the method (rank, storage, ...).
        batch_size: sequences of one forward pass, on each rank.
        accumulation: forward passes of one step.
        checkpointing: "full" recomputes every block in the backward pass.
        update_in_backward: each parameter is updated, and its gradient freed, in the backward pass.
        clip: largest gradient norm; 0: no clipping.
        clipping: whose norm that is, with `update_in_backward`.
        ranks: devices over which FSDP2 shards weights, gradients and states.
        device: decides in how large pieces an optimizer's step works.
    """

    model: ModelSpec
    method: str = "galore"
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    accumulation: int = 1
    checkpointing: Checkpointing = "none"
    update_in_backward: bool = False
    clip: float = 1.0
    clipping: Literal["whole", "inside", "each"] = "whole"
    ranks: int = 1
    device: Literal["cpu", "cuda"] = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "ranks"):
            value = getattr(self, name)
            if value < 1:
                raise JobError(f"{name}={value} must be at least 1")
        if self.model.sequence_length < 2:
            raise JobError(f"sequence_length={self.model.sequence_length} must be at least 2")
        if self.clipping != "whole" and not self.update_in_backward:
            raise JobError(f"clipping={self.clipping!r} needs update_in_backward")
        if self.ranks > 1:
            if self.update_in_backward:
                raise JobError(
                    "update_in_backward works in one process: with FSDP2 gradients are averaged "
                    "only after the hooks have run"
                )
            if self.model.int8_weights or self.model.base_weights != "none":
                raise JobError("weights in few bits work in one process; leave out --ranks")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on one rank."""
        return self.batch_size * self.accumulation * self.model.sequence_length

    @property
    def updates_at_once(self) -> bool:
        """Whether a gradient can be freed as soon as it is there.

        With accumulation, or clipping by a common norm, updates wait for the step; see
        `subspan.optim.backward`.
        """
        waits = self.accumulation != 1 or (self.clip and self.clipping != "each")
        return self.update_in_backward and not waits
