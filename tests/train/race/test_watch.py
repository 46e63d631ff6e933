"""Live progress: one line for each evaluation and each end, nothing twice."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from subspan.train.files import write_json
from subspan.train.race.config import CompareConfig
from subspan.train.race.plan import plan_race
from subspan.train.race.watch import ConsoleWatcher

LOSS = {"step": 2, "tokens": 100, "seconds": 2.0, "loss": 3.0}
EVALUATION = {"step": 4, "tokens": 200, "seconds": 4.0, "validation_loss": 3.0, "perplexity": 20.1}


def test_lines_of_a_run_are_shown_once(comparison: Callable[..., CompareConfig]) -> None:
    race = plan_race(comparison())
    run = race.run(race.arms["galore"], {"lr": 0.1}, 0)
    out = io.StringIO()
    lines: list[dict[str, Any]] = []
    with ConsoleWatcher(Console(file=out, width=200)) as watcher:
        watcher.run_started(run, 8)
        watcher.run_metrics(run, lines)
        lines.append(LOSS)
        watcher.run_metrics(run, lines)
        lines.append(EVALUATION)
        watcher.run_metrics(run, lines)
        watcher.run_metrics(run, lines)
        watcher.run_ended(run, 8, None)
        watcher.run_pruned(run, "pruned at rung 1: [bad]")
        watcher.run_ended(run, None, "killed")
        write_json(run.path / "result.json", {"perplexity": 19.5})
        watcher.run_ended(run, None, None)
    assert out.getvalue().splitlines() == [
        "galore 4/40: loss 3.000, validation perplexity 20.1, 50 tokens/s",
        "galore: pruned at rung 1: [bad]",
        "galore: failed: killed",
        "galore: validation perplexity 19.50",
    ]


def test_lines_of_an_earlier_session_are_not_shown_again(
    comparison: Callable[..., CompareConfig],
) -> None:
    import json

    race = plan_race(comparison())
    run = race.run(race.arms["galore"], {"lr": 0.1}, 0)
    Path(run.config.output).mkdir(parents=True)
    old = [EVALUATION | {"step": step} for step in (4, 8, 12)]
    text = "".join(json.dumps(line) + "\n" for line in old)
    (run.path / "metrics.jsonl").write_text(text)
    out = io.StringIO()
    watcher = ConsoleWatcher(Console(file=out, width=200))
    watcher.run_started(run, None)
    watcher.run_metrics(run, old)
    # The run goes on from step 8 and writes step 12 again.
    watcher.run_metrics(run, old[:2])
    watcher.run_metrics(run, old)
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == ["galore 12/40"]
