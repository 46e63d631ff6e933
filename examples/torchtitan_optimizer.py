"""A method of Subspan in torchtitan, in place of its `OptimizersContainer`.

In a torchtitan config (a `Trainer.Config` of its model registry):

    optimizer=SubspanOptimizers.Config(method="galore", lr=0.01, options={"rank": 128})

torchtitan applies FSDP2 before it builds optimizers, which is what Subspan's need; it saves and
loads them with torch.distributed.checkpoint through the flat dictionaries below.
Written for torchtitan 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer

import subspan.optim


class SubspanOptimizers(OptimizersContainer):
    """One Subspan optimizer for each part of the model (pipeline parallelism has several)."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        method: str = "galore"
        """Name in `subspan.optim.methods()`."""
        lr: float = 0.01
        """Learning rate."""
        options: dict[str, Any] = field(default_factory=dict)
        """Options of the method: rank, update_proj_gap, ..."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [
            subspan.optim.for_model(part, config.method, lr=config.lr, **config.options)
            for part in model_parts
        ]
        parameters = [
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        self._validate_params(parameters)
        self._post_init(parameters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        torchtitan asks each optimizer which states it holds. Here a rank may hold none of a
        parameter that another rank owns, and yet must take part in gathering it: all that the
        dictionary has is passed on.
        """
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            states: dict[int, dict[str, Any]] = {}
            for group in own["param_groups"]:
                for number, name in zip(group["params"], group["param_names"], strict=True):
                    prefix = f"state.{name}."
                    found = {
                        key.removeprefix(prefix): value
                        for key, value in state_dict.items()
                        if key.startswith(prefix)
                    }
                    if found:
                        states[number] = found
                first = group["param_names"][0]
                for key in group.keys() - {"params", "param_names"}:
                    group[key] = state_dict[f"param_groups.{first}.{key}"]
            optimizer.load_state_dict({"state": states, "param_groups": own["param_groups"]})
