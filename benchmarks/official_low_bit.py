"""Authors' code with states or weights in few bits, and the libraries it is built on."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.contenders import LEARNING_RATE, SCALE, Builder
from benchmarks.official_code import gradients, groups, stub, with_gradients, without_synchronize
from benchmarks.shapes import Parameters

# GaLore-8bit and Q-GaLore pass bitsandbytes two positional arguments whose places have since been
# given to others (max_unorm, skip_zeros); these values switch those off.
_BITSANDBYTES = {"percentile_clipping": 0.0, "block_wise": False, "weight_decay": 0.0}


def galore_8bit(p: Parameters, rank: int, gap: int) -> Optimizer:
    module = importlib.import_module("galore_torch.adamw8bit")
    vars(module)["torch"] = without_synchronize()
    grouped = groups(p, rank=rank, update_proj_gap=gap, scale=SCALE, proj_type="std")
    optimizer = module.AdamW8bit(grouped, lr=LEARNING_RATE, **_BITSANDBYTES)
    return with_gradients(optimizer, gradients(p))


def _former_bitsandbytes() -> ModuleType:
    """Q-GaLore's two functions of bitsandbytes, without the two arguments that came in between."""
    new = importlib.import_module("bitsandbytes.functional")
    none = (0.0, 0.0)  # beta3 and alpha, which Adam does not use

    def update_32bit(*given: Any, **named: Any) -> None:
        new.optimizer_update_32bit(*given[:10], *none, *given[10:], **named)

    def update_8bit(*given: Any, **named: Any) -> None:
        new.optimizer_update_8bit_blockwise(*given[:7], *none, *given[7:], **named)

    return stub(
        "bitsandbytes.functional",
        optimizer_update_32bit=update_32bit,
        optimizer_update_8bit_blockwise=update_8bit,
    )


def _q_galore_optimizer(p: Parameters, rank: int, gap: int) -> Any:
    module = importlib.import_module("q_galore_torch.q_galore_adamw8bit")
    vars(module).update(torch=without_synchronize(), F=_former_bitsandbytes())
    basis = {"quant": True, "quant_n_bit": 4, "quant_group_size": 256}
    lazy = {"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    grouped = groups(
        p, rank=rank, update_proj_gap=gap, scale=SCALE, proj_type="std", **basis, **lazy
    )
    optimizer = module.AdamW8bit(grouped, lr=LEARNING_RATE, **_BITSANDBYTES)
    options = optimizer.get_config
    former = {"percentile_clipping": 100, "block_wise": True}  # no clipping; blockwise states
    optimizer.get_config = lambda *at: {**options(*at), **former}
    return optimizer


def q_galore(p: Parameters, rank: int, gap: int) -> Optimizer:
    return with_gradients(_q_galore_optimizer(p, rank, gap), gradients(p))


def q_galore_int8(p: Parameters, rank: int, gap: int) -> Optimizer:
    """Weights in 8 bits with stochastic rounding: the setting of the paper."""
    codes = [
        nn.Parameter(torch.zeros_like(weight, dtype=torch.uint8), requires_grad=False)
        for weight in p.projected
    ]
    optimizer = _q_galore_optimizer(Parameters(codes, p.plain), rank, gap)
    for code, weight in zip(codes, p.projected, strict=True):
        code.data, scales, zeros = optimizer._quantize(weight.detach(), q_group_size=256)
        vars(code).update(scales=scales, zeros=zeros, group_size=256, stochastic_round=True)

    def restore() -> None:
        for code, weight in zip(codes, p.projected, strict=True):
            vars(code)["float_grad"] = weight.grad

    return with_gradients(optimizer, restore)


def adamw_8bit(p: Parameters, rank: int, gap: int) -> Optimizer:
    package = importlib.import_module("bitsandbytes.optim")
    return package.AdamW8bit([*p.plain, *p.projected], lr=LEARNING_RATE)


def torchao(class_name: str) -> Builder:
    def build(p: Parameters, rank: int, gap: int) -> Optimizer:
        package = importlib.import_module("torchao.optim")
        return getattr(package, class_name)([*p.plain, *p.projected], lr=LEARNING_RATE)

    return build
