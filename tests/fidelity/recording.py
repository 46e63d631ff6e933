"""Recorded trajectories: reading them, and running an optimizer along one.

They lie in tests/golden, reduced to what the tests compare (see reduce.py there). SUBSPAN_GOLDEN
names another folder with recordings of the same form, for instance of other seeds and settings.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FOLDER = Path(os.environ.get("SUBSPAN_GOLDEN") or Path(__file__).parents[1] / "golden")
# The order in which the official codes handed out their seeds.
PARAMETERS = ("bias", "wide", "tall", "square")
STEPS = 40

Tensors = dict[str, torch.Tensor]


def load(name: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a recording, and its specification."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata() or {}
        names = list(file.keys())
        tensors = {key: file.get_tensor(key) for key in names}
    return tensors, json.loads(metadata.get("spec", "{}"))


def recorded_bases(recording: Mapping[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """{parameter: {step: basis or pair}} from names such as basis/wide.0/step11."""
    bases: dict[str, dict[int, Any]] = defaultdict(dict)
    for key, value in recording.items():
        if not key.startswith("basis/"):
            continue
        _, parameter, step = key.split("/")
        parameter, _, half = parameter.partition(".")
        at = int(step.removeprefix("step"))
        if half:
            bases[parameter].setdefault(at, [None, None])[int(half)] = value
        else:
            bases[parameter][at] = value
    return bases


def follow(
    build: Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer],
    recording: Mapping[str, torch.Tensor],
    *,
    tolerance: float,
    parameters: Sequence[str] = PARAMETERS,
    inputs: str = "inputs",
    until: int = STEPS,
    dtype: torch.dtype = torch.float32,
    outliers: float = 0.0,
) -> torch.optim.Optimizer:
    """Feed the recorded gradients and compare the weights at every recorded step.

    Args:
        build: makes the optimizer from the parameters by name.
        recording: holds `weight/PARAMETER/stepNN`.
        tolerance: largest absolute difference of a weight.
        parameters: those to train and compare.
        inputs: file with the initial weights and the gradients.
        until: last step.
        dtype: of weights and gradients.
        outliers: share of a weight's entries that may differ by more, where rounding falls on the
            other side of a code or a sign.
    """
    given = load(inputs)[0]
    weights = {p: torch.nn.Parameter(given[f"init/{p}"].to(dtype)) for p in parameters}
    optimizer = build(weights)
    compared = 0
    for step in range(1, until + 1):
        for parameter, weight in weights.items():
            weight.grad = given[f"grad/{step:02d}/{parameter}"].to(dtype)
        optimizer.step()
        for parameter, weight in weights.items():
            expected = recording.get(f"weight/{parameter}/step{step:02d}")
            if expected is not None:
                difference = (weight.detach() - expected).abs()
                share = (difference > tolerance).float().mean().item()
                assert share <= outliers, (parameter, step, difference.max().item(), share)
                compared += 1
    recorded = [key for key in recording if key.startswith("weight/")]
    expected_count = sum(
        key.split("/")[1] in parameters and int(key[-2:]) <= until for key in recorded
    )
    assert compared == expected_count > 0
    return optimizer
