"""Runs that update in the backward pass or hold weights in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.job import run_job
from subspan.train.metrics import read_metrics
from subspan.train.progress import RunProgress

Settings = Callable[..., TrainConfig]
LAZY: dict[str, Any] = {"method_options": {"cos_threshold": 1.0}}
INT8 = {"method": "q_galore", "int8_weights": True, **LAZY}
MODES = [
    {"update_in_backward": True, "clip": 0},
    {"update_in_backward": True, "clip": 0.1, "clipping": "each", "method": "fira"},
    {"update_in_backward": True, "clip": 0.1, "clipping": "inside", "accumulation": 2},
    INT8,
    INT8 | {"update_in_backward": True, "clip": 0},
]


def losses(folder: str) -> list[float]:
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_in_the_backward_pass_give_the_ordinary_run(
    settings: Settings, accumulation, tmp_path
):
    clip = 0.5 if accumulation == 1 else 0
    folders = []
    for fused in (False, True):
        config = settings(
            output=str(tmp_path / str(fused)),
            update_in_backward=fused,
            accumulation=accumulation,
            clip=clip,
        )
        run_job(config)
        folders.append(config.output)
    ordinary, fused = map(losses, folders)
    assert ordinary == pytest.approx(fused, abs=2e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_activations_computed_again_give_the_ordinary_run(settings: Settings, fused, tmp_path):
    folders, calls = [], []
    for again in (False, True):
        config = settings(
            output=str(tmp_path / str(again)),
            activation_checkpointing=again,
            update_in_backward=fused,
            clip=0,
            steps=3,
        )
        with torch.profiler.profile() as seen:
            run_job(config)
        folders.append(config.output)
        calls.append(sum(event.count for event in seen.key_averages() if event.key == "aten::silu"))
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), abs=1e-5)
    assert calls[1] > calls[0]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_interrupted_run_goes_on_to_the_same_end(
    settings: Settings, mode, monkeypatch, tmp_path
):
    from transformers import AutoModelForCausalLM

    whole = settings(output=str(tmp_path / "whole"), **mode)
    run_job(whole)
    cut = settings(output=str(tmp_path / "cut"), **mode)
    real = RunProgress.step

    def step(self: RunProgress, number: int) -> None:
        real(self, number)
        if number == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunProgress, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run_job(cut)
    monkeypatch.undo()
    run_job(cut)
    assert losses(whole.output) == losses(cut.output)
    one, two = (
        load_file(Path(folder) / "final" / "model.safetensors")
        for folder in (whole.output, cut.output)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # The final model is a plain one, whatever the weights were held in.
    assert all(value.is_floating_point() for value in one.values())
    AutoModelForCausalLM.from_pretrained(Path(whole.output) / "final")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"update_in_backward": True, "method": "fira", "clip": 1.0}, "clipping='each'"),
        ({"update_in_backward": True, "accumulation": 2}, "clipping='inside'"),
        ({"update_in_backward": True, "clip": 0, "accumulation": 2, "method": "fira"}, "lifted"),
        ({"int8_weights": True, "method": "swats", "rank": None, "update_proj_gap": None}, "exact"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    settings: Settings, changes, says
):
    config = settings(**changes)
    with pytest.raises(JobError, match=says):
        run_job(config)
    assert not (Path(config.output) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "changes", [{"clipping": "each"}, {"update_in_backward": True, "compile": True}], ids=str
)
def test_options_that_do_not_belong_together_are_refused(settings: Settings, changes):
    with pytest.raises(JobError, match="update_in_backward"):
        settings(**changes)
