"""Live progress of a comparison: one row per run on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from subspan.train import runfolder
from subspan.train.metrics import read_metrics
from subspan.train.race.plan import Run
from subspan.train.race.race import Watcher


class ConsoleWatcher(Watcher):
    """Shows a comparison on `console`: rows of running runs, and a line for each that ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._shown: dict[Run, int] = {}
        self._tasks: dict[Run, TaskID] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> ConsoleWatcher:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def run_started(self, run: Run, until: int | None) -> None:
        """A row for the run."""
        # What an earlier session wrote is not news.
        self._shown[run] = len(read_metrics(run.path / runfolder.METRICS))
        total = until or run.config.total_steps
        self._tasks[run] = self._progress.add_task(
            escape(run.folder), total=total, state="starting"
        )

    def run_metrics(self, run: Run, lines: Sequence[dict[str, Any]]) -> None:
        """Show the last lines."""
        shown = self._shown[run]
        if len(lines) <= shown:
            self._shown[run] = len(lines)  # those after the last checkpoint are written again
            return
        new, self._shown[run] = lines[shown:], len(lines)
        text = state(lines)
        self._progress.update(self._tasks[run], completed=lines[-1]["step"], state=text)
        evaluated = [line for line in new if "perplexity" in line]
        if not self._live and evaluated:
            self._print(f"{run.folder} {evaluated[-1]['step']}/{run.config.total_steps}: {text}")

    def run_ended(self, run: Run, until: int | None, reason: str | None) -> None:
        """Say how far the run came, its result, or why it failed."""
        if run in self._tasks:
            self._progress.remove_task(self._tasks.pop(run))
        result = run.result() if reason is None else None
        if reason is not None:
            self._print(f"{run.folder}: failed: {reason}", "red")
        elif result is not None:
            self._print(f"{run.folder}: validation perplexity {result['perplexity']:.2f}", "green")

    def run_pruned(self, run: Run, reason: str) -> None:
        """Say that a trial does not go on."""
        self._print(f"{run.folder}: {reason}", "dim")

    def clock_started(self, rounds: int) -> None:
        """Say so."""
        self._print(f"timing {rounds} steps of every arm in turn")

    def clock_failed(self, reason: str) -> None:
        """Say so."""
        self._print(reason, "red")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def state(lines: Sequence[dict[str, Any]]) -> str:
    """Last loss, last perplexity and speed, from metrics lines."""
    parts = []
    loss = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
    perplexity = next(
        (line["perplexity"] for line in reversed(lines) if "perplexity" in line), None
    )
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if perplexity is not None:
        parts.append(f"validation perplexity {perplexity:.1f}")
    if lines[-1]["seconds"]:
        parts.append(f"{lines[-1]['tokens'] / lines[-1]['seconds']:,.0f} tokens/s")
    return ", ".join(parts)
