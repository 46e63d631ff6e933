"""Optimizers without a subspace against recorded trajectories (float32, all recorded steps)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from recording import PARAMETERS, follow, load

import subspan.optim as optim
from subspan.optim.parts.activity import LayerBlocks
from subspan.subspaces.layout import Layout

MATRICES = ("wide", "tall", "square")
PLAIN = {"lr": 1e-2, "weight_decay": 0.0}
# The recordings train the bias with torch.optim.AdamW in its defaults.
ADAM = {"adam_betas": (0.9, 0.999), "adam_eps": 1e-8}
BLOCKS = (("wide",), ("tall",), ("square", "bias"))


def check(name: str, method: str, tolerance: float, **options: Any) -> torch.optim.Optimizer:
    recording, spec = load(name)
    parameters = PARAMETERS if "weight/bias/step01" in recording else MATRICES
    assert spec["lr"] == options["lr"]
    return follow(
        lambda weights: optim.build(method, list(weights.items()), **options),
        recording,
        tolerance=tolerance,
        parameters=parameters,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("original", {}),
        ("match_rms", {"adjust_lr_fn": "match_rms_adamw"}),
        ("nonesterov", {"nesterov": False}),
    ],
)
def test_muon_equals_torch_optim_muon(name, options, dtype):
    # The recording is bfloat16 arithmetic; the same arithmetic leaves what another processor's
    # order of summation may do to it.
    tolerance = 5e-3 if dtype == "float32" else 5e-4
    check(f"muon_torch_{name}", "muon", tolerance, dtype=dtype, **options, **PLAIN, **ADAM)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("auon", "auon", {}),
        ("hybrid_auon_ns1", "hybrid_auon", {"ns_steps": 1}),
        ("hybrid_auon_ns5", "hybrid_auon", {"ns_steps": 5}),
    ],
)
def test_auon_as_released_equals_the_released_code(name, method, options):
    check(name, method, 1e-6, as_released=True, **options, **PLAIN, **ADAM)


def test_fismo_equals_a_transcription_of_its_algorithm():
    options = {"polar": "svd", "momentum": 0.9, "gamma": 0.95, "damping": 0.1}
    check("ref_fismo", "fismo", 2e-6, **options, **PLAIN)


def test_swats_in_its_adam_phase_equals_a_third_party_code():
    recording, _ = load("swats_third_party")

    def build(weights: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [(name, weights[name]) for name in MATRICES], "eps": 1e-6},
            {"params": [("bias", weights["bias"])], "eps": 1e-8},
        ]
        return optim.build("swats", groups, **PLAIN)

    # The reference computes its step in another order of roundings.
    optimizer = follow(build, recording, tolerance=1e-5)
    assert all("exp_avg_sq" in state for state in optimizer.state.values())


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_badam_equals_the_released_code(order, monkeypatch):
    name = f"badam_{order}"
    _, spec = load(name)
    turns = spec["active_block_per_step"]
    if order == "random":

        def recorded(self: LayerBlocks, period: int, layouts: Sequence[Layout]) -> frozenset[int]:
            turn = turns[max(0, period * self.gap - 1)]
            active = {part.rstrip(".") for part in turn.split(",")}
            return frozenset(i for i, layout in enumerate(layouts) if layout.name in active)

        monkeypatch.setattr(LayerBlocks, "active", recorded)
    optimizer = check(
        name,
        "badam",
        2e-6,
        switch_block_every=spec["update_gap"],
        switch_mode=order,
        blocks=BLOCKS,
        first_short=True,
        **PLAIN,
    )
    training = {n for n, p in zip(PARAMETERS, optimizer.param_groups[0]["params"], strict=True)
                if p.requires_grad}  # fmt: skip
    assert training == {part.rstrip(".") for part in turns[-1].split(",")}
