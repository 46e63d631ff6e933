"""The table of a report on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from subspan.report.loading import Arm, Report, load
from subspan.report.words import bytes_text, change_text, seconds_text

_COLUMNS = {
    "validation perplexity": ("perplexity", "{:.2f}".format),
    "change": None,
    "optimizer state": ("state_bytes", bytes_text),
    "peak memory": ("peak_memory_bytes", bytes_text),
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "time": ("seconds", seconds_text),
}
_STATES = {
    "finished": "—",
    "failed": "[red]failed[/red]",
    "unreadable": "[red]not readable[/red]",
    "stopped": "not finished",
    "running": "running",
    "waiting": "waiting",
}
_WITH_SPREAD = ("perplexity", "tokens_per_second", "seconds")


def results_table(source: Report | Path, title: str | None = None) -> Table:
    """Rows in the order of the report; changes are against the first arm with a result.

    Numbers of several seeds are means, where it says something with ± their sample standard
    deviation.

    Args:
        source: the report, or the folder of a run or comparison.
        title: none: the report's.

    Raises:
        JobError: there is nothing in the folder.
    """
    report = source if isinstance(source, Report) else load([source])
    table = Table(title=title or report.title, title_justify="left", header_style="bold")
    table.add_column("method", style="bold", no_wrap=True)
    for column in _COLUMNS:
        table.add_column("\n".join(column.split(" ", 1)), justify="right")
    if report.seeded:
        table.add_column("seeds", justify="right")
    reference = next((arm for arm in report.arms if arm.mean), None)
    for arm in report.arms:
        if arm.mean is None or reference is None:
            table.add_row(Text(arm.name), _STATES[arm.state])
            continue
        cells = [_cell(arm, reference, column) for column in _COLUMNS]
        table.add_row(Text(arm.name), *cells, *([str(arm.seeds)] if report.seeded else []))
    return table


def _cell(arm: Arm, reference: Arm, column: str) -> str:
    assert arm.mean is not None and reference.mean is not None
    rule = _COLUMNS[column]
    if rule is None and arm is reference:
        return "—"
    if rule is None:
        return change_text(arm.mean["perplexity"], reference.mean["perplexity"])
    name, text = rule
    spread = f" ± {text(arm.spread[name])}" if arm.spread and name in _WITH_SPREAD else ""
    return text(arm.mean[name]) + spread


def failures(report: Report) -> list[str]:
    """One line for each arm without a result, or with a run that failed."""
    return [f"{arm.name}: {arm.reason}" for arm in report.arms if arm.reason]
