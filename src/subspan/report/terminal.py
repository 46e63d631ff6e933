"""The table that ends a comparison on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from subspan.report.runs import Run
from subspan.report.words import bytes_text, change_text, seconds_text


def results_table(runs: Sequence[Run], title: str | None = None) -> Table:
    """Rows in the order of `runs`; changes are against the first finished one."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("method", style="bold", no_wrap=True)
    for column in (
        "validation\nperplexity",
        "change",
        "optimizer\nstate",
        "peak\nmemory",
        "tokens/s",
        "time",
    ):
        table.add_column(column, justify="right")
    reference = next((run.result for run in runs if run.result), None)
    for run in runs:
        if run.result is None or reference is None:
            table.add_row(run.name, "[red]failed[/red]")
            continue
        result = run.result
        table.add_row(
            run.name,
            f"{result['perplexity']:.2f}",
            change_text(result["perplexity"], reference["perplexity"]),
            bytes_text(result["state_bytes"]["total"]),
            bytes_text(result["peak_memory_bytes"]["process"]),
            f"{result['tokens_per_second']:,.0f}",
            seconds_text(result["seconds"]),
        )
    return table


def failures(runs: Sequence[Run]) -> list[str]:
    """One line for each run without a result."""
    return [f"{run.name}: {run.reason}" for run in runs if run.result is None]
