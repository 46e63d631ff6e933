"""`subspan report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subspan.cli.common import console


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or comparisons.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="HTML file; default: in the first folder.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading.")] = None,
) -> None:
    """Write one self-contained HTML file on runs, finished or not."""
    from subspan.report import build_report, load_runs
    from subspan.report.terminal import results_table
    from subspan.train.files import write_text

    found, runs = load_runs(folders)
    file = output or folders[0] / "report.html"
    write_text(file, build_report(folders, title))
    out = console()
    out.print(results_table(runs, title or found))
    out.print(f"report: {file}", highlight=False, soft_wrap=True)
