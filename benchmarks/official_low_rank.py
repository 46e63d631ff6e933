"""Authors' code of the methods whose moments or updates are low-rank."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.contenders import LEARNING_RATE, SCALE, Builder
from benchmarks.official_code import (
    from_repository,
    gradients,
    groups,
    silent,
    stub,
    supplied,
    torch_with,
    with_gradients,
)
from benchmarks.shapes import Parameters


def coap(class_name: str) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        tucker = ("coap_torch.projection.coap_high_order_tensor", "TuckerCOAP")  # convolutions
        module = from_repository("coap", "coap_torch", stubs=(tucker,))
        projected = {"proj_method": "coap", "rank": rank, "update_interval": gap, "scale": SCALE}
        # Grouped by hand: left to itself it would project the embedding and the head as well.
        grouped = groups(p, **projected)
        return getattr(module, class_name)(grouped_params_with_proj=grouped, lr=LEARNING_RATE)

    return build


def online_subspace_descent(p: Parameters, rank: int, gap: int) -> Optimizer:
    """`gap` is the inverse of the basis's learning rate; the basis moves at every step."""
    module = from_repository(
        "Online-Subspace-Descent", "galore_torch.adamw", stubs=(("wandb", "log"),)
    )
    online = {"update_proj_gap": gap, "proj_type": "continuous"}
    unnamed = [None] * len(p.projected)  # a name would make it log histograms
    grouped = groups(p, rank=rank, scale=SCALE, names=unnamed, **online)
    return module.AdamW(grouped, lr=LEARNING_RATE, no_deprecation_warning=True)


def sn_sm(*, norm: bool = False, momentum: bool = False) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        module = from_repository("sn-sm", "GenericOptim")
        vars(module)["print"] = silent
        projected: dict[str, Any] = {"subset_size": "heuristics"} if norm else {}
        if momentum:
            projected.update(rank=rank, update_proj_gap=gap, proj_type="svd")
        return module.GenericOptim(
            groups(p, **projected),
            lr=LEARNING_RATE,
            momentum_type="sm" if momentum else "ema",
            second_moment_type="sn" if norm else "ema",
        )

    return build


def _ista(module: str) -> ModuleType:
    package = "ista_daslab_optimizers"
    triton = f"{package}.utils.newton_schulz_triton"
    return from_repository(
        "ISTA-DASLab-Optimizers",
        f"{package}.fft_low_rank.{module}",
        bare=package,
        stubs=(("wandb", "log"), (triton, "newton_schulz_triton")),
    )


def dct_adamw(*, dynamic: bool = False, fft: bool = False) -> Builder:
    """`dynamic`: new columns at every step, error feedback and rotation; else every `gap` steps."""

    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        module = _ista("dct_adamw")
        vars(module)["print"] = silent
        return module.DCTAdamW(
            [*p.plain, *p.projected],
            lr=LEARNING_RATE,
            weight_decay=0.0,
            rank=rank,
            proj="dct",
            # It tells embeddings from other matrices by their size.
            max_shape=min(max(q.shape) for q in p.plain if q.ndim == 2),
            update_proj_gap=1 if dynamic else gap,
            use_ef=dynamic,
            rotate_subspace=dynamic,
            sim_type="makhoul" if fft else "matmul",
        )

    return build


def trion(*, fft: bool = False) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        module = _ista("trion")
        cache = module.GlobalCache
        # The file uses three names that it does not define; the cache is filled before it is read.
        vars(module).update(
            device=torch.device("cpu"),
            dtype=torch.float32,
            get_dct_matrix=lambda size, key, device, dtype: cache.get("ortho", key),
        )
        # A group of one process, where the gathered list is the tensor itself.
        vars(module)["dist"] = stub(
            "torch.distributed",
            get_world_size=lambda: 1,
            get_rank=lambda: 0,
            all_gather=lambda tensor_list, tensor: None,
        )
        muon = {"use_muon": True, "rank": rank, "ns_type": "torch", "scaling_type": "kj"}
        plain = {"params": p.plain, "lr": LEARNING_RATE, "use_muon": False}
        projected = {"params": p.projected, "lr": LEARNING_RATE, "use_makhoul": fft, **muon}
        return module.Trion([projected, plain])

    return build


class _Identity:
    """`torch.eye(n)` that stays where it is when it is sent to "cuda"."""

    def __init__(self, size: int) -> None:
        self.matrix = torch.eye(size)

    def to(self, device: str) -> torch.Tensor:
        return self.matrix


def subtrack(p: Parameters, rank: int, gap: int) -> Optimizer:
    """SubTrack++ with all three components, as in the authors' scripts."""
    module = from_repository(
        "SubTrack",
        "low_rank_torch.adamw",
        stubs=(("low_rank_torch.subspace_evaluation_analyzer", "SubspaceEvaluationAnalyzer"),),
    )
    projector = module.LowRankProjector.track_the_subspace.__globals__
    projector["torch"] = torch_with(eye=_Identity)
    tracking = {
        "subspace_update_method": "subtrack",
        "subspace_update_interval": gap,
        "st_init_step_size": 10,
        "st_step_size_scheduler": "constant",
        "st_step_size_coef": 1.0,
        "st_noise_sigma2": 0,
        "st_subspace_coef": 1.0,
    }
    parts = {"adaptive_optimizer": True, "recovery_scaling": True}
    grouped = groups(p, rank=rank, scale=SCALE, proj_type="std", **tracking, **parts)
    return module.AdamW(grouped, lr=LEARNING_RATE, no_deprecation_warning=True)


def ldadam(p: Parameters, rank: int, gap: int) -> Optimizer:
    """Its error buffer is what it leaves in `.grad`, which is not counted as state."""
    module = from_repository("LDAdam", "ldadamw_torch")
    low_rank, plain = {"rank": rank, "enable_lowrank": True}, {"enable_lowrank": False}
    grouped = [{"params": p.projected, **low_rank}, {"params": p.plain, **plain}]
    return module.LDAdamW(grouped, lr=LEARNING_RATE)


def flora(p: Parameters, rank: int, gap: int) -> Optimizer:
    module = importlib.import_module("flora_opt")
    if module.Flora is None:  # the package swallows the error
        raise ImportError("flora_opt needs accelerate and bitsandbytes")
    grouped = [{"params": p.plain, "rank": None}, {"params": p.projected}]
    optimizer = module.Flora(grouped, lr=LEARNING_RATE, rank=rank, kappa=gap, beta1=0.9)
    return with_gradients(optimizer, gradients(p))


def frugal(class_name: str, **options: Any) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        # torch has dropped this private function, which was the square root of a number.
        base = importlib.import_module("torch.optim.optimizer")
        with supplied(base, _dispatch_sqrt=math.sqrt):
            module = from_repository("FRUGAL", "frugal")
        grouped = groups(p, is_proj_params=True)
        optimizer = getattr(module, class_name)
        return optimizer(
            grouped, update_gap=gap, lr=LEARNING_RATE, no_deprecation_warning=True, **options
        )

    return build
