"""Live progress of one run: a bar on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunProgress:
    """Shows the metrics lines of one run.

    Args:
        console: where to show them.
        name: of the run.
        steps: of the whole run.
        done: steps done before this session.
    """

    def __init__(self, console: Console, name: str, steps: int, done: int = 0) -> None:
        self._console = console
        self._steps = steps
        self._shown: dict[str, Any] = {"loss": "", "perplexity": "", "speed": ""}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]} {task.fields[perplexity]} {task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=steps, completed=done, **self._shown)

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, number: int) -> None:
        """Step `number` is done."""
        self._progress.update(self._task, completed=number)

    def add(self, line: dict[str, Any]) -> None:
        """Show a metrics line."""
        if "loss" in line:
            self._shown["loss"] = f"loss {line['loss']:.3f}"
        else:
            self._shown["perplexity"] = f"validation perplexity {line['perplexity']:.1f}"
        if line["seconds"]:
            self._shown["speed"] = f"{line['tokens'] / line['seconds']:,.0f} tokens/s"
        self._progress.update(self._task, completed=line["step"], **self._shown)
        if not self._console.is_terminal and "perplexity" in line:
            shown = ", ".join(text for text in self._shown.values() if text)
            self._console.print(f"step {line['step']}/{self._steps}: {shown}", highlight=False)
