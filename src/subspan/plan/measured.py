"""The process that measures: reads settings from standard input, prints bytes as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from subspan.layers import QuantisedWeight
from subspan.optim import SubspaceOptimizer
from subspan.plan.activations import enable_checkpointing
from subspan.plan.inputs import loss_of
from subspan.plan.measure import unpacked
from subspan.plan.model import BuiltModel, ModelSpec, build_model
from subspan.plan.parts import build_on
from subspan.plan.settings import Settings
from subspan.train.machine import peak_memory, reset_peak_memory

_STEPS = 2


def main() -> None:
    """Measure what standard input asks for."""
    settings = unpacked(json.load(sys.stdin))
    tiny = ModelSpec("nano", sequence_length=16, dtype=settings.model.dtype)
    with suppress(Exception):  # A method may refuse so small a model.
        _run(replace(settings, model=tiny, batch_size=1, accumulation=1), rehearsal=True)
    _release()
    program = _resident()
    parts, peak = _run(settings)
    where = "the CPU, in a clean process"
    if settings.device == "cuda":
        peak, where = peak_memory()["gpu"] + program, torch.cuda.get_device_name()
    values = {"parts": parts, "peak": peak - program, "program": program, "where": where}
    print(json.dumps(values))


def _run(settings: Settings, rehearsal: bool = False) -> tuple[dict[str, int], int]:
    """(bytes by part, largest resident memory of the process)."""
    built = build_model(settings.model, settings.device)
    model = built.module.train()
    if settings.checkpointing == "full":
        enable_checkpointing(model)
    options = dict(settings.options)
    if rehearsal and "rank" in options:
        options["rank"] = 4
    optimizer = build_on(model, settings.method, options)
    gradients = _GradientWatch(model)
    if settings.update_in_backward:
        optimizer.attach_to_backward(
            model,
            accumulation_steps=settings.accumulation,
            max_norm=settings.clip or None,
            clipping=settings.clipping,
        )
    reset_peak_memory()
    for _ in range(_STEPS):
        _step(built, optimizer, settings)
    peak = peak_memory()["process"]
    states = {k: v for k, v in optimizer.state_bytes().items() if k != "total"}
    parts = {
        "weights": _bytes(model.parameters()),
        "buffers": _bytes(model.buffers()),
        "gradients": gradients.most,
    }
    return parts | states, peak


def _step(built: BuiltModel, optimizer: SubspaceOptimizer, settings: Settings) -> None:
    """One step as `subspan train` takes it."""
    model, device = built.module, settings.device
    mixed = settings.model.dtype == "bfloat16-mixed"
    for _ in range(settings.accumulation):
        inputs = built.make_inputs(settings.batch_size, settings.model.sequence_length)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(device, torch.bfloat16) if mixed else nullcontext():
            loss = loss_of(model(**inputs))
        loss.backward()
        del loss
    if settings.clip and not settings.update_in_backward:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad()


class _GradientWatch:
    """The most bytes of gradients that exist when one has arrived."""

    def __init__(self, model: nn.Module) -> None:
        self.most = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        self.most = max(self.most, _bytes(p.grad for p in self._parameters))


def _bytes(tensors: Any) -> int:
    """Bytes of the distinct storages of tensors."""
    found: dict[int, int] = {}
    for tensor in tensors:
        held = [tensor]
        if isinstance(tensor, QuantisedWeight):
            held = [tensor.codes, tensor.scale, tensor.zero]
        for part in held:
            if part is not None:
                storage = part.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _release() -> None:
    """Give memory that is not used back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
