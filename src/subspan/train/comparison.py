"""Several methods on the same job, one after the other, each in a process of its own.

A process of its own makes peak memory each method's, and lets the comparison survive the failure
of one. Finished arms are not run again, interrupted ones go on from their last checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.train import runfolder
from subspan.train.config import CompareConfig, TrainConfig
from subspan.train.corpora import check_corpus
from subspan.train.distributed import world_size
from subspan.train.errors import JobError
from subspan.train.files import write_json, write_text
from subspan.train.job import check_method
from subspan.train.metrics import read_metrics
from subspan.train.model import check_model_name
from subspan.train.yamlfile import dump_yaml

RESULTS = "results.json"
ERRORS = "errors.txt"

_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Outcome:
    """What became of one arm: a result, or the reason why there is none."""

    name: str
    folder: Path
    result: dict[str, Any] | None
    reason: str | None = None


class Watcher:
    """What a comparison tells about its progress; the base class shows nothing."""

    def arm_started(self, name: str, config: TrainConfig) -> None:
        """Arm `name` starts or goes on."""

    def arm_metrics(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """All metrics lines of the running arm so far; called a few times each second."""

    def arm_ended(self, outcome: Outcome) -> None:
        """The arm finished, was finished already, or failed."""


def plan_arms(
    config: CompareConfig, methods: Sequence[str] | None = None
) -> dict[str, TrainConfig]:
    """Configuration of every arm, in order.

    Args:
        config: the comparison.
        methods: arms to run; none: all of `config`. A name that is no arm of `config` is a method
            run with the job's fields.

    Raises:
        JobError: no arms, a name twice, an unknown method, or a field that is not allowed.
    """
    names = list(methods or config.arms)
    if not names:
        raise JobError("nothing to compare: name arms in the configuration or with --methods")
    for name in names:
        if names.count(name) > 1:
            raise JobError(f"arm {name} is named twice in --methods")
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] == ".":
            raise JobError(f"arm name {name!r}: use letters, digits, '-', '_' and '.'")
    arms = {name: config.arm(name) for name in names}
    for name, arm in arms.items():
        try:
            check_method(arm.method, arm.hyper())
            check_model_name(arm.model)
            check_corpus(arm.data.corpus, arm.data.packages)
        except JobError as error:
            raise JobError(f"arm {name}: {error}") from None
    return arms


def compare(
    config: CompareConfig,
    methods: Sequence[str] | None = None,
    watcher: Watcher | None = None,
) -> list[Outcome]:
    """Run every arm and write results.json into the comparison's folder.

    Args:
        config: the comparison.
        methods: see `plan_arms`.
        watcher: told about the progress.

    Returns:
        One outcome per arm, in order. An arm that failed has a reason instead of a result.

    Raises:
        JobError: bad configuration, or a folder that holds another comparison. Nothing has run.
    """
    if world_size() > 1:
        raise JobError("a comparison starts one process per arm itself; run it without torchrun")
    watcher = watcher or Watcher()
    arms = plan_arms(config, methods)
    folder = Path(config.output)
    for name, arm in arms.items():
        try:
            runfolder.check_output(Path(arm.output), arm)
        except JobError as error:
            raise JobError(f"arm {name}: {error}") from None
    outcomes = []
    with runfolder.locked(folder):
        for name, arm in arms.items():
            watcher.arm_started(name, arm)
            outcome = _run_arm(name, arm, watcher)
            outcomes.append(outcome)
            watcher.arm_ended(outcome)
            write_json(folder / RESULTS, summary(config, outcomes))
    return outcomes


def summary(config: CompareConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Content of results.json: every arm's result or reason, and whether the race was fair."""
    return {
        "title": config.title,
        "arms": {
            o.name: o.result if o.result is not None else {"failed": o.reason} for o in outcomes
        },
        "same_inputs": same_inputs([o.result for o in outcomes if o.result is not None]),
    }


def same_inputs(results: Sequence[dict[str, Any]]) -> bool:
    """Whether all runs began from the same text and the same initial weights."""
    names = ("corpus_hash", "initial_weights_hash")
    return len({tuple(result["inputs"][name] for name in names) for result in results}) <= 1


def _run_arm(name: str, arm: TrainConfig, watcher: Watcher) -> Outcome:
    folder = Path(arm.output)
    result = runfolder.read_result(folder)
    if result is not None:
        return Outcome(name, folder, result)
    file = folder.parent / f".{name}.yaml"
    write_text(file, dump_yaml(arm.model_dump(mode="json")))
    errors = folder.parent / f"{name}-{ERRORS}"
    try:
        status = _run_process(file, errors, lambda: watcher.arm_metrics(name, _lines(folder)))
    finally:
        file.unlink(missing_ok=True)
    text = errors.read_text(encoding="utf-8", errors="replace").strip()
    result = runfolder.read_result(folder) if status == 0 else None
    if result is not None:
        errors.unlink()
        return Outcome(name, folder, result)
    return Outcome(name, folder, None, _reason(status, text, errors))


def _lines(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / runfolder.METRICS)


def _run_process(config: Path, errors: Path, poll: Callable[[], None]) -> int:
    command = [sys.executable, "-m", "subspan", "train", "--config", str(config), "--quiet"]
    # The child imports the same subspan, also when it is not installed.
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Waiting threads sleep: spinning ones stall each other when other programs need the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
        )
        try:
            while True:
                try:
                    return process.wait(timeout=_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    poll()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _reason(status: int, text: str, errors: Path) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", probably for want of memory" if -status == signal.SIGKILL else ""
        return f"ended by signal {name}{hint}"
    last = text.splitlines()[-1] if text else "no message"
    message = last.removeprefix("error: ")
    return message if len(text.splitlines()) <= 1 else f"{message} (all of it in {errors})"
