"""Comparisons: processes of their own, failures, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspan.train import comparison as module
from subspan.train.comparison import Outcome, Watcher, compare, plan_arms
from subspan.train.config import CompareConfig, TrainConfig
from subspan.train.errors import JobError


@pytest.fixture
def comparison(settings: Callable[..., TrainConfig], tmp_path: Path) -> CompareConfig:
    job = settings(rank=None, update_proj_gap=None, steps=4, eval_every=2).model_dump(mode="json")
    job.pop("output")
    job.pop("method")
    return CompareConfig(
        output=str(tmp_path / "out"),
        title="A test",
        job=job,
        arms={
            "galore": {"rank": 4},
            # Allowed values that only training finds out to be bad.
            "broken": {"method": "galore", "rank": 4, "lr": 1e30, "plain_lr": 1e30, "clip": 0},
        },
    )


class Recorder(Watcher):
    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[Outcome] = []
        self.lines = 0

    def arm_started(self, name: str, config: TrainConfig) -> None:
        self.started.append(name)

    def arm_metrics(self, name: str, lines: Any) -> None:
        self.lines += 1

    def arm_ended(self, outcome: Outcome) -> None:
        self.ended.append(outcome)


@pytest.mark.slow
def test_comparison_survives_a_failure_and_does_not_repeat_what_is_done(
    comparison: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Recorder()
    outcomes = compare(comparison, ["broken", "galore"], watcher)
    assert watcher.started == ["broken", "galore"]
    assert watcher.ended == outcomes
    assert watcher.lines > 0
    by_name = {outcome.name: outcome for outcome in outcomes}
    assert by_name["broken"].result is None
    assert "training diverged" in (by_name["broken"].reason or "") or "NaN or infinity" in (
        by_name["broken"].reason or ""
    )
    results = json.loads((Path(comparison.output) / "results.json").read_text())
    assert results["same_inputs"] is True
    assert results["arms"]["galore"] == by_name["galore"].result
    assert results["arms"]["broken"] == {"failed": by_name["broken"].reason}

    # Finished arms are taken as they are: no process may start.
    monkeypatch.setattr(module, "_run_process", None)
    assert compare(comparison, ["galore"]) == [by_name["galore"]]


def test_arm_ended_by_a_signal_or_a_traceback_has_a_reason(tmp_path: Path) -> None:
    reason = module._reason
    assert "signal SIGKILL, probably for want of memory" in reason(-9, "", tmp_path / "e")
    assert reason(2, "error: no text", tmp_path / "e") == "no text"
    long = reason(1, "Traceback\n  line\nValueError: bad", tmp_path / "e")
    assert long == f"ValueError: bad (all of it in {tmp_path / 'e'})"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["adamw", "adamw"], "arm adamw is named twice"),
        (["galor"], "arm galor: method='galor' is not known"),
        (["../up"], "arm name '../up'"),
        ([""], "arm name ''"),
    ],
)
def test_bad_arms_are_refused_before_anything_runs(
    comparison: CompareConfig, methods: list[str], message: str
) -> None:
    with pytest.raises(JobError) as error:
        compare(comparison, methods)
    assert message in str(error.value)
    assert not Path(comparison.output).exists()


def test_empty_comparison_and_bad_fields_are_refused(comparison: CompareConfig) -> None:
    with pytest.raises(JobError, match="nothing to compare"):
        plan_arms(comparison.model_copy(update={"arms": {}}))
    bad = comparison.model_copy(update={"arms": {"galore": {"rnk": 3}}})
    with pytest.raises(JobError, match="arm galore: unknown key rnk"):
        plan_arms(bad)
    bad = comparison.model_copy(update={"job": comparison.job | {"model": "llama-2b"}})
    with pytest.raises(JobError, match="arm galore: unknown model 'llama-2b'"):
        plan_arms(bad)


def test_folder_of_another_comparison_is_refused_before_anything_runs(
    comparison: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspan.train import runfolder

    arm = comparison.arm("galore")
    runfolder.write_config(Path(arm.output), arm.model_copy(update={"seed": 5}))
    monkeypatch.setattr(module, "_run_process", None)
    with pytest.raises(JobError, match=r"arm galore: .*holds another run .seed is 5 there, 0 here"):
        compare(comparison, ["adamw", "galore"])
    assert not (Path(comparison.output) / "adamw").exists()
