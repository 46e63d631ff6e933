"""Authors' code of the methods whose moments have the size of their matrices."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.contenders import LEARNING_RATE, Builder
from benchmarks.official_code import (
    beside_adamw,
    from_repository,
    gradients,
    silent,
    with_gradients,
)
from benchmarks.shapes import Parameters


def auon(class_name: str) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        module = from_repository("AuON", "auon")
        return beside_adamw(getattr(module, class_name)(p.projected, lr=LEARNING_RATE), p)

    return build


def muon(p: Parameters, rank: int, gap: int) -> Optimizer:
    return beside_adamw(torch.optim.Muon(p.projected, lr=LEARNING_RATE), p)


def badam(p: Parameters, rank: int, gap: int) -> Optimizer:
    """One block for each layer (seven matrices), everything that is not projected always active."""
    package: Any = importlib.import_module("badam.block_optim")
    vars(package)["print"] = silent
    restore = gradients(p)  # before those of the inactive blocks are dropped

    class BAdam(package.BlockOptimizer):
        """Shows the state of the optimizer inside, which it replaces at every switch."""

        @property
        def state(self) -> Any:
            return self.base_optimizer.state

        @state.setter
        def state(self, value: Any) -> None:
            """The base class starts with an empty one."""

    named = p.named_projected() + p.named_plain()
    layers = dict.fromkeys(".".join(name.split(".")[:3]) for name, _ in p.named_projected())
    base = torch.optim.AdamW([q for _, q in named], lr=LEARNING_RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about float32 weights, which it copies all the same
        optimizer = BAdam(
            base,
            named,
            [[f"{layer}."] for layer in layers],
            switch_block_every=gap,
            active_modules=["plain."],
        )
    return with_gradients(optimizer, restore)


def swats(p: Parameters, rank: int, gap: int) -> Optimizer:
    package = importlib.import_module("pytorch_optimizer")
    return package.SWATS([*p.plain, *p.projected], lr=LEARNING_RATE)
