"""`subspan report`."""

from __future__ import annotations

import os
import sys
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
    show: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open it in the browser; default: on a terminal."),
    ] = None,
) -> None:
    """Write one self-contained HTML file on runs, finished or not.

    What cannot be read is one line each; the rest is still shown.
    """
    from subspan.report import load, render
    from subspan.report.terminal import results_table
    from subspan.train.files import write_text

    found = load(folders)
    for problem in found.problems:
        print(f"warning: {problem}", file=sys.stderr)
    home = next(f for f in folders if any(shown.is_relative_to(f) for shown in found.folders))
    file = output or home / "report.html"
    write_text(file, render(found, title))
    out = console()
    out.print(results_table(found, title))
    out.print(f"report: {file}", highlight=False, soft_wrap=True)
    if show or (show is None and _has_screen()):
        import webbrowser

        webbrowser.open(file.resolve().as_uri())


def _has_screen() -> bool:
    """Whether a person at a graphical screen is likely to wait for the report."""
    if not sys.stdout.isatty():
        return False
    windows = sys.platform in ("darwin", "win32")
    return windows or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
