"""`--until`: a run that stops on request goes on as if it had not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspan.train import job
from subspan.train.checkpoints import last_complete, step_of
from subspan.train.config import TrainConfig
from subspan.train.job import run_job
from subspan.train.metrics import read_metrics

Settings = Callable[..., TrainConfig]


def lines(config: TrainConfig, *kinds: str) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.output) / "metrics.jsonl")
    drop = ("seconds", "optimizer_seconds")
    return [
        {k: v for k, v in line.items() if k not in drop}
        for line in found
        if any(kind in line for kind in kinds)
    ]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "final" / "model.safetensors")


@pytest.mark.parametrize("method", ["adamw", "galore", "ldadam"])
def test_run_stopped_twice_equals_a_whole_one_bit_for_bit(
    settings: Settings, tmp_path: Path, method: str
) -> None:
    common: dict[str, Any] = {"method": method}
    if method != "galore":
        common |= {"update_proj_gap": None}
    if method == "adamw":
        common |= {"rank": None}
    whole, cut = (settings(output=str(tmp_path / name), **common) for name in ("whole", "cut"))
    expected = run_job(whole)
    folder = Path(cut.output)
    # Step 5 is no checkpoint otherwise, step 8 is one.
    for until in (5, 8):
        assert run_job(cut, until=until) is None
        last = last_complete(folder / "checkpoints")
        assert last is not None
        assert step_of(last) == until
        assert lines(cut, "loss", "validation_loss")[-1]["step"] == until
        assert not (folder / "result.json").exists()
        assert not (folder / "final").exists()
    result = run_job(cut)
    assert result is not None
    assert expected is not None
    assert result["validation_loss"] == expected["validation_loss"]
    first, second = weights(whole), weights(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert lines(whole, "validation_loss") == lines(cut, "validation_loss")
    extra = [line for line in lines(cut, "loss") if line["step"] != 5]
    # The training loss is an average since the line before, which step 5 has cut in two.
    assert [x for x in extra if x["step"] != 6] == [
        x for x in lines(whole, "loss") if x["step"] != 6
    ]


def test_stop_at_a_checkpoint_leaves_no_trace_in_the_metrics(
    settings: Settings, tmp_path: Path
) -> None:
    whole, cut = (settings(output=str(tmp_path / name)) for name in ("whole", "cut"))
    run_job(whole)
    run_job(cut, until=8)
    run_job(cut)
    assert lines(whole, "loss", "validation_loss") == lines(cut, "loss", "validation_loss")


def test_step_that_is_done_is_not_done_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    run_job(config, until=8)
    with monkeypatch.context() as patch:
        patch.setattr(job, "prepare", None)  # A training would fail.
        assert run_job(config, until=8) is None
        assert run_job(config, until=3) is None
    # At or after the end there is nothing to stop.
    result = run_job(config, until=12)
    assert result is not None
    assert run_job(config, until=3) == result


def test_run_of_an_earlier_version_that_recorded_less_goes_on(settings: Settings) -> None:
    import json

    config = settings()
    run_job(config, until=4)
    file = Path(config.output) / "inputs.json"
    record = json.loads(file.read_text())
    assert record.pop("seed") == 0
    assert len(record.pop("data_order_hash")) == 64
    file.write_text(json.dumps(record))
    assert run_job(config) is not None
    assert json.loads(file.read_text())["seed"] == 0
