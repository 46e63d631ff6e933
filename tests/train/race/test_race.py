"""The race with invented runs: courses, rows, failures, and going on after any interruption."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from subspan.train.errors import JobError
from subspan.train.race.config import CompareConfig
from subspan.train.race.plan import Run
from subspan.train.race.race import Watcher, compare
from subspan.train.race.results import read_results

Build = Callable[..., CompareConfig]


class Interrupted(BaseException):
    """Not an Exception, so that nothing handles it."""


class Recorder(Watcher):
    def __init__(self) -> None:
        self.events: list[str] = []

    def run_started(self, run: Run, until: int | None) -> None:
        self.events.append(f"start {run.folder} {until}")

    def run_ended(self, run: Run, until: int | None, reason: str | None) -> None:
        self.events.append(f"end {run.folder} {until} {reason}")

    def run_pruned(self, run: Run, reason: str) -> None:
        self.events.append(f"pruned {run.folder}")

    def run_metrics(self, run: Run, lines: Sequence[dict[str, Any]]) -> None:
        pass


def steps(invented: Any) -> list[tuple[str, int | None]]:
    return [(step.run.folder, step.until) for step in invented.started]


def states(results: Any) -> dict[str, str]:
    return {row["folder"]: row["state"] for row in results["runs"]}


def test_arms_without_search_run_one_after_the_other_in_their_own_folders(
    comparison: Build, invented: Any
) -> None:
    config, watcher = comparison(), Recorder()
    results = compare(config, None, watcher)
    assert steps(invented) == [("adamw", None), ("galore", None)]
    assert watcher.events == [
        "start adamw None",
        "end adamw None None",
        "start galore None",
        "end galore None None",
    ]
    assert results == read_results(Path(config.output))
    assert results["search"] is None
    arm = results["arms"]["galore"]
    own = json.loads((Path(config.output) / "galore" / "result.json").read_text())
    assert arm["mean"]["validation_loss"] == own["validation_loss"]
    assert (arm["chosen"], arm["settings"]) == ("lr-0.02", {"lr": 0.02})
    assert (arm["spread"], arm["failed"], arm["seeds"]) == (None, None, 1)

    # Finished runs are taken as they are.
    assert compare(config) == results
    assert len(invented.started) == 2


def test_halving_lets_the_best_go_on_and_the_winner_runs_with_all_seeds(
    searching: Build, invented: Any
) -> None:
    config = searching(arms={"adamw": {"search": {"lr": [1e-4, 1e-3, 1e-2, 3e-2]}}})
    results = compare(config)
    # The bowl is around 1e-3: 1e-4 and 1e-2 are equally far, 3e-2 is worst.
    name = "adamw/lr-{}/seed-0"
    assert steps(invented) == [
        *((name.format(lr), 8) for lr in ("0.0001", "0.001", "0.01", "0.03")),
        *((name.format(lr), 24) for lr in ("0.0001", "0.001")),
        (name.format("0.001"), None),
        ("adamw/lr-0.001/seed-1", None),
    ]
    assert list(states(results).values()) == [
        *("stopped", "finished", "stopped", "stopped", "finished"),
    ]
    row = results["runs"][3]
    loss = 3 + math.exp(-0.8) + 0.05 * math.log(30) ** 2 * 0.8
    best = 3 + math.exp(-0.8)
    assert row["reason"] == f"pruned at rung 1: loss {loss:.4f}, best {best:.4f}"
    assert (row["steps"], row["rung"], row["role"]) == (8, 1, "trial")
    assert row["validation_loss"] == pytest.approx(loss)
    second = results["runs"][0]
    assert (second["steps"], second["rung"]) == (24, 2)
    assert [row["role"] for row in results["runs"]].count("final") == 2
    assert results["search"] == {
        "sampler": "grid",
        "trials": 4,
        "rungs": [8, 24],
        "keep": 0.5,
        "seed": 0,
    }
    arm = results["arms"]["adamw"]
    losses = [3 + math.exp(-4), 3 + math.exp(-4) + 0.001]
    assert arm["chosen"] == "lr-0.001"
    assert arm["mean"]["validation_loss"] == pytest.approx(statistics.fmean(losses))
    assert arm["spread"]["validation_loss"] == pytest.approx(statistics.stdev(losses))
    assert arm["mean"]["state_bytes"] == 400
    assert results["same_inputs"] is True


def test_diverged_trial_is_a_row_and_is_not_repeated(searching: Build, invented: Any) -> None:
    config = searching(halving=None)
    results = compare(config)
    row = next(row for row in results["runs"] if row["trial"] == "lr-1")
    assert row["state"] == "failed"
    assert row["reason"].startswith("training diverged: loss is nan at step")
    assert row["steps"] == 20
    assert row["validation_loss"] > 3
    assert results["arms"]["adamw"]["chosen"] == "lr-0.001"
    assert results["arms"]["adamw"]["failed"] is None
    count = len(invented.started)
    assert compare(config) == results
    assert len(invented.started) == count


def test_killed_run_is_a_row_and_the_next_start_repairs_the_table(
    searching: Build, invented: Any
) -> None:
    whole = searching()
    expected = compare(whole)
    shutil.rmtree(whole.output)
    # The best trial of adamw is killed, so that another one wins for now.
    invented.started.clear()
    invented.interrupt = lambda count: "killed by signal SIGKILL" if count == 2 else None
    results = compare(whole)
    assert states(results)["adamw/lr-0.001/seed-0"] == "failed"
    assert results["arms"]["adamw"]["chosen"] != "lr-0.001"
    assert results["arms"]["galore"] == expected["arms"]["galore"]
    invented.interrupt = lambda count: None
    assert compare(whole) == expected


def test_arm_whose_runs_all_fail_has_a_reason_and_others_go_on(
    comparison: Build, searching: Build, invented: Any
) -> None:
    invented.interrupt = lambda count: "out of memory: 3 TB" if count == 1 else None
    results = compare(comparison())
    assert results["arms"]["adamw"]["failed"] == "out of memory: 3 TB"
    assert results["arms"]["adamw"]["mean"] is None
    assert results["arms"]["galore"]["mean"] is not None
    invented.interrupt = lambda count: "no luck"
    results = compare(searching(output=comparison().output + "2"))
    assert results["arms"]["galore"]["failed"] == "no trial is left; the last failed: no luck"
    assert results["arms"]["galore"]["chosen"] is None


def test_failed_seed_is_named_and_the_others_are_averaged(comparison: Build, invented: Any) -> None:
    invented.interrupt = lambda count: "killed" if count == 2 else None
    results = compare(comparison(seeds=[0, 1, 2]))
    arm = results["arms"]["adamw"]
    assert (arm["seeds"], arm["failed"]) == (2, "seed 1: killed")
    assert arm["mean"]["tokens_per_second"] == 1001
    assert results["arms"]["galore"]["seeds"] == 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("search", [{}, {"sampler": "optuna", "trials": 5, "together": 2}])
def test_race_interrupted_anywhere_ends_with_the_same_table(
    searching: Build, invented: Any, tmp_path: Path, search: dict[str, Any], seed: int
) -> None:
    if search:
        pytest.importorskip("optuna")
    changes: dict[str, Any] = {"search": search}
    if search:
        wide = {"search": {"lr": {"low": 1e-4, "high": 3.0}}}
        changes["arms"] = {"adamw": wide, "galore": wide | {"rank": 4}}
    expected = compare(searching(**changes))
    done = len(invented.started)
    whole = steps(invented)
    source = random.Random(seed)
    config = searching(**changes, output=str(tmp_path / "cut"))

    def sometimes(count: int) -> None:
        if source.random() < 0.3:
            raise Interrupted

    invented.interrupt = sometimes
    results = None
    while results is None:
        try:
            results = compare(config)
        except Interrupted:
            about = read_results(Path(config.output))
            assert not any(row["state"] == "running" for row in about["runs"])
    assert results == expected
    # Nothing was done twice: what was interrupted had not begun.
    repeated = steps(invented)[done:]
    assert sorted(set(repeated), key=repeated.index) == whole


def test_optuna_keeps_its_trials_when_an_earlier_one_succeeds_late(
    searching: Build, invented: Any
) -> None:
    pytest.importorskip("optuna")
    wide = {"search": {"lr": {"low": 1e-4, "high": 1e-1}}}
    config = searching(search={"sampler": "optuna", "trials": 6}, arms={"adamw": wide})
    invented.interrupt = lambda count: "killed" if count == 1 else None
    first = compare(config)
    invented.interrupt = lambda count: None
    second = compare(config)
    trials = [[r["trial"] for r in each["runs"] if r["seed"] == 0] for each in (first, second)]
    assert trials[0] == trials[1]
    assert len(set(trials[0])) == 6


def test_extended_grid_reuses_what_is_done(searching: Build, invented: Any) -> None:
    small = {"adamw": {"search": {"lr": [1e-4, 1e-3]}}}
    compare(searching(arms=small, halving=None))
    invented.started.clear()
    large = {"adamw": {"search": {"lr": [1e-4, 1e-3, 1e-2]}}}
    results = compare(searching(arms=large, halving=None))
    assert steps(invented) == [("adamw/lr-0.01/seed-0", None)]
    assert results["search"]["trials"] == 3


def test_folder_of_an_earlier_version_is_refused_untouched(
    comparison: Build, invented: Any
) -> None:
    config = comparison()
    Path(config.output).mkdir()
    file = Path(config.output) / "results.json"
    file.write_text('{"title": "T", "arms": {}, "same_inputs": true}')
    with pytest.raises(JobError, match="of an earlier version"):
        compare(config)
    assert [path.name for path in Path(config.output).iterdir()] == ["results.json"]
    assert invented.started == []


def test_second_comparison_in_the_same_folder_is_refused(comparison: Build, invented: Any) -> None:
    from subspan.train import runfolder

    config = comparison()
    with (
        runfolder.locked(Path(config.output)),
        pytest.raises(JobError, match="in use by another process"),
    ):
        compare(config)
