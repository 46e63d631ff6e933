"""results.json of a comparison: what it holds, reading it, and whether the race was fair.

The file is a summary that can be made again from the run folders; only the reasons of failures and
the measurement of the clock are known to it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from subspan.train.errors import JobError
from subspan.train.files import write_json

RESULTS = "results.json"
VERSION = 2

State = Literal["waiting", "running", "stopped", "finished", "failed"]

MEASURES = (
    "validation_loss",
    "perplexity",
    "state_bytes",
    "peak_memory_bytes",
    "seconds",
    "tokens_per_second",
)
"""What `mean` and `spread` of an arm hold."""


class SearchRow(TypedDict):
    """How learning rates were searched: `trials` in every arm, `rungs` in steps, with `seed`."""

    sampler: Literal["grid", "optuna"]
    trials: int
    rungs: list[int]
    keep: float | None
    seed: int


class RunRow(TypedDict):
    """One run: a trial of the search, or a final run of the settings that an arm is judged by.

    `settings` are the fields that vary within the arm, `folder` is relative to the comparison's,
    `rung` counts the rungs passed, `validation_loss` is the last seen, and `reason` says why a run
    was stopped or failed.
    """

    arm: str
    trial: str
    settings: dict[str, Any]
    seed: int
    role: Literal["trial", "final"]
    folder: str
    state: State
    steps: int
    rung: int | None
    validation_loss: float | None
    reason: str | None


class ArmRow(TypedDict):
    """One arm: the chosen trial, and mean and sample standard deviation over finished seeds."""

    method: str
    chosen: str | None
    settings: dict[str, Any]
    seeds: int
    mean: dict[str, float] | None
    spread: dict[str, float] | None
    failed: str | None


class ClockArm(TypedDict):
    """Seconds of a step: median with quartiles, mean, and the median of the optimizer's part
    (none where it is inside the backward pass)."""

    step_seconds: float
    low: float
    high: float
    mean_seconds: float
    optimizer_seconds: float | None


class ClockRow(TypedDict):
    """Steps of all arms timed in turn, `rounds` times."""

    rounds: int
    arms: dict[str, ClockArm]
    machine: dict[str, Any]


class Results(TypedDict):
    """Content of results.json; `tokens` is the budget of every final run."""

    version: int
    title: str
    same_inputs: bool
    tokens: int
    search: SearchRow | None
    seeds: list[int]
    runs: list[RunRow]
    arms: dict[str, ArmRow]
    clock: ClockRow | None


_SCHEMA = TypeAdapter(Results)


def read_results(folder: Path) -> Results:
    """results.json of the comparison in `folder`.

    Raises:
        JobError: there is none, it is damaged, or of another version.
    """
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.get("version", 1)
    except OSError:
        raise JobError(f"folder {folder} holds no comparison ({RESULTS} is missing)") from None
    except (ValueError, AttributeError):
        raise JobError(_damaged(path)) from None
    if version != VERSION:
        age = "an earlier" if version == 1 else "another"
        raise JobError(
            f"{path} is of {age} version ({version}, this is {VERSION}); run the comparison again "
            "in a new folder"
        )
    try:
        return _SCHEMA.validate_python(found)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise JobError(f"{_damaged(path)} (at {place})") from None


def write_results(folder: Path, results: Results) -> None:
    """Write results.json so that a reader sees the old content or the new."""
    write_json(folder / RESULTS, results)


def _damaged(path: Path) -> str:
    return (
        f"{path} is damaged; delete it and run the same comparison again to write it anew "
        "(finished runs are not repeated)"
    )


def same_inputs(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs (contents of result.json) had the same text, and those of one seed the same
    initial weights and order of data."""
    inputs = [result["inputs"] for result in results]
    # A run of an earlier version recorded neither seed nor order.
    starts = {
        (each.get("seed"), each["initial_weights_hash"], each.get("data_order_hash"))
        for each in inputs
    }
    one_start_per_seed = len({seed for seed, *_ in starts}) == len(starts)
    return len({each["corpus_hash"] for each in inputs}) <= 1 and one_start_per_seed
