"""Optimizers of packages: torch's, the first three methods' authors', and pytorch_optimizer's."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.contenders import LEARNING_RATE, REFERENCE, SCALE, Builder, Contender
from benchmarks.shapes import Parameters


def _two_groups(p: Parameters, **low_rank: Any) -> list[dict[str, Any]]:
    return [{"params": p.plain}, {"params": p.projected, **low_rank}]


def _torch_adamw(*, foreach: bool = False, fused: bool = False) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        every = p.plain + p.projected
        return torch.optim.AdamW(every, lr=LEARNING_RATE, foreach=foreach, fused=fused)

    return build


def _torch_sgd(p: Parameters, rank: int, gap: int) -> Optimizer:
    return torch.optim.SGD(p.plain + p.projected, lr=LEARNING_RATE, momentum=0.9, fused=True)


def _galore_torch(p: Parameters, rank: int, gap: int) -> Optimizer:
    from galore_torch import GaLoreAdamW

    groups = _two_groups(p, rank=rank, update_proj_gap=gap, scale=SCALE, proj_type="std")
    return GaLoreAdamW(groups, lr=LEARNING_RATE, no_deprecation_warning=True)


def _fira(p: Parameters, rank: int, gap: int) -> Optimizer:
    from fira import FiraAdamW

    groups = _two_groups(p, rank=rank, update_proj_gap=gap, alpha=SCALE, proj_type="std")
    return FiraAdamW(groups, lr=LEARNING_RATE, no_deprecation_warning=True)


def _apollo_torch(rank_override: int | None, scale: float, scale_type: str) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        from apollo_torch import APOLLOAdamW

        groups = _two_groups(
            p,
            rank=rank_override or rank,
            update_proj_gap=gap,
            scale=scale,
            scale_type=scale_type,
            proj="random",
            proj_type="std",
        )
        return APOLLOAdamW(groups, lr=LEARNING_RATE)

    return build


def _pytorch_optimizer(class_name: str, **options: Any) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        import pytorch_optimizer

        groups = _two_groups(p, rank=rank, update_proj_gap=gap, scale=SCALE, projection_type="std")
        return getattr(pytorch_optimizer, class_name)(groups, lr=LEARNING_RATE, **options)

    return build


def reference(family: str) -> Contender:
    """torch's fused AdamW, the fastest there is on a CPU, as a member of a family."""
    build = _torch_adamw(fused=True)
    return Contender(family, REFERENCE, "torch", build, phase=None, work="adamw")


def package_contenders() -> list[Contender]:
    """Peers of the methods that have a package, without the reference."""
    third = "pytorch_optimizer"
    lifted = "lifts the scaled coordinates instead of rescaling the gradient"
    apollo = _pytorch_optimizer("APOLLO", scale_type="channel")
    channel, tensor = _apollo_torch(None, 1.0, "channel"), _apollo_torch(1, 128.0, "tensor")
    mini = ("apollo_mini", "APOLLO-Mini")
    return [
        Contender("adamw", "AdamW foreach", "torch", _torch_adamw(foreach=True), phase=None),
        Contender("sgd", "SGD fused", "torch", _torch_sgd, phase=None),
        Contender("galore", "GaLore", "galore-torch", _galore_torch, official=True),
        Contender("galore", "GaLore", third, _pytorch_optimizer("GaLore"), phase=1),
        Contender("fira", "Fira", "fira", _fira, official=True),
        Contender("fira", "Fira", third, _pytorch_optimizer("Fira"), phase=1),
        Contender("apollo", "APOLLO", "apollo-torch", channel, official=True),
        Contender("apollo", "APOLLO", third, apollo, phase=1, note=lifted),
        Contender(*mini, "apollo-torch", tensor, official=True),
    ]
