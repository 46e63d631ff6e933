"""Live progress of a comparison: one row per arm on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from subspan.train.comparison import Outcome, Watcher
from subspan.train.config import TrainConfig


class ConsoleWatcher(Watcher):
    """Shows a comparison on `console`.

    Args:
        console: where to show it.
        arms: configuration of every arm, in order.
    """

    def __init__(self, console: Console, arms: dict[str, TrainConfig]) -> None:
        self._console = console
        self._live = console.is_terminal
        self._shown = 0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
        )
        self._tasks = {
            name: self._progress.add_task(name, total=arm.total_steps, start=False, state="waiting")
            for name, arm in arms.items()
        }
        self._steps = {name: arm.total_steps for name, arm in arms.items()}

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

    def arm_started(self, name: str, config: TrainConfig) -> None:
        """The arm's clock starts."""
        self._shown = 0
        self._progress.start_task(self._tasks[name])
        self._progress.update(self._tasks[name], state="starting")

    def arm_metrics(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """Show the last lines."""
        if not lines or len(lines) == self._shown:
            return
        new, self._shown = lines[self._shown :], len(lines)
        state = _state(lines)
        self._progress.update(self._tasks[name], completed=lines[-1]["step"], state=state)
        evaluated = [line for line in new if "perplexity" in line]
        if not self._live and evaluated:
            step = evaluated[-1]["step"]
            self._console.print(f"{name} {step}/{self._steps[name]}: {state}", highlight=False)

    def arm_ended(self, outcome: Outcome) -> None:
        """Show the result or the reason."""
        task = self._tasks[outcome.name]
        if outcome.result is not None:
            state = f"[green]validation perplexity {outcome.result['perplexity']:.2f}"
            self._progress.update(task, completed=self._steps[outcome.name], state=state)
        else:
            state = f"[red]failed: {outcome.reason}"
            self._progress.update(task, state="[red]failed")
        self._progress.stop_task(task)
        if not self._live or outcome.result is None:
            self._console.print(f"{outcome.name}: {state}", highlight=False, soft_wrap=True)


def _state(lines: Sequence[dict[str, Any]]) -> str:
    last = lines[-1]
    parts = []
    loss = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
    perplexity = next(
        (line["perplexity"] for line in reversed(lines) if "perplexity" in line), None
    )
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if perplexity is not None:
        parts.append(f"validation perplexity {perplexity:.1f}")
    if last["seconds"]:
        parts.append(f"{last['tokens'] / last['seconds']:,.0f} tokens/s")
    return ", ".join(parts)
