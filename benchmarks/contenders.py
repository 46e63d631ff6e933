"""The optimizers that are compared: ours through the public interface, and the peers.

Peers are optional. Each builder imports its own, so one that is missing costs only its row. All run
their own defaults but for learning rate, rank, gap and scale, which are the same in a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.shapes import Parameters

LEARNING_RATE = 1e-3
SCALE = 0.25

Builder = Callable[[Parameters, int, int], Optimizer]


@dataclass(frozen=True)
class Contender:
    """One optimizer in a family of optimizers that are stepped in turn.

    `build(parameters, rank, gap)` returns it. `phase` is 0 where the basis is recomputed at steps
    0, gap, 2*gap, ..., 1 where the counter starts at one, so that it happens one step earlier, and
    None where no step differs from the others.
    """

    family: str
    name: str
    package: str
    build: Builder
    phase: int | None = 0

    @property
    def ours(self) -> bool:
        return self.package == "subspan"

    @property
    def label(self) -> str:
        return f"{self.package} {self.name}"


def _two_groups(p: Parameters, **low_rank: Any) -> list[dict[str, Any]]:
    return [{"params": p.plain}, {"params": p.projected, **low_rank}]


def _ours(
    method: str, *, rank: str | None = "rank", gap: str | None = "update_proj_gap", **options: Any
) -> Builder:
    """`rank` and `gap` name the method's own hyper-parameters for these, None where it has none."""

    def build(p: Parameters, chosen_rank: int, chosen_gap: int) -> Optimizer:
        import subspan.optim

        groups: list[dict[str, Any]] = [
            {"params": p.plain, "project": False},
            {"params": p.projected},
        ]
        named = {rank: chosen_rank, gap: chosen_gap}
        given = {name: value for name, value in named.items() if name is not None}
        return subspan.optim.build(method, groups, lr=LEARNING_RATE, **{**given, **options})

    return build


def _torch_adamw(*, foreach: bool = False, fused: bool = False) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        every = p.plain + p.projected
        return torch.optim.AdamW(every, lr=LEARNING_RATE, foreach=foreach, fused=fused)

    return build


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


_FUSED = _torch_adamw(fused=True)


def contenders() -> list[Contender]:
    """Every contender, families together, ours first in each."""
    fused_in = [
        Contender(family, "AdamW fused", "torch", _FUSED, phase=None)
        for family in ("adamw", "galore", "fira", "apollo", "apollo_mini", "others")
    ]
    rows = [
        Contender("adamw", "AdamW", "subspan", _ours("adamw", rank=None, gap=None), phase=None),
        Contender("adamw", "AdamW foreach", "torch", _torch_adamw(foreach=True), phase=None),
        Contender("galore", "GaLore", "subspan", _ours("galore", scale=SCALE)),
        Contender("galore", "GaLore", "galore-torch", _galore_torch),
        Contender("galore", "GaLore", "pytorch_optimizer", _pytorch_optimizer("GaLore"), phase=1),
        Contender("fira", "Fira", "subspan", _ours("fira", alpha=SCALE)),
        Contender("fira", "Fira", "fira", _fira),
        Contender("fira", "Fira", "pytorch_optimizer", _pytorch_optimizer("Fira"), phase=1),
        Contender("apollo", "APOLLO", "subspan", _ours("apollo")),
        # The authors' package keeps its random basis; ours draws it again unless told otherwise.
        Contender("apollo", "APOLLO stored basis", "subspan", _ours("apollo", store_basis=True)),
        Contender("apollo", "APOLLO", "apollo-torch", _apollo_torch(None, 1.0, "channel")),
        Contender(
            "apollo",
            "APOLLO",
            "pytorch_optimizer",
            _pytorch_optimizer("APOLLO", scale_type="channel"),
            phase=1,
        ),
        Contender("apollo_mini", "APOLLO-Mini", "subspan", _ours("apollo_mini", rank=None)),
        Contender("apollo_mini", "APOLLO-Mini", "apollo-torch", _apollo_torch(1, 128.0, "tensor")),
        Contender(
            "others",
            "FRUGAL",
            "subspan",
            _ours("frugal", rank=None, gap="update_gap", density=0.25),
        ),
        Contender(
            "others",
            "FRUGAL svd",
            "subspan",
            _ours(
                "frugal",
                rank=None,
                gap="update_gap",
                density=0.25,
                projection="svd",
                finder="randomized",
            ),
        ),
        Contender("others", "Flora", "subspan", _ours("flora", gap="kappa"), phase=1),
        Contender("others", "LDAdam", "subspan", _ours("ldadam", gap=None), phase=None),
    ]
    order = ["adamw", "galore", "fira", "apollo", "apollo_mini", "others"]
    return sorted(rows + fused_in, key=lambda c: (order.index(c.family), not c.ours))
