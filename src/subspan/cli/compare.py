"""`subspan compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from subspan.cli.common import ConfigFile, Quiet, Setting, console, fail


def compare(
    config: ConfigFile = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Arms to run, separated by commas.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Runs at the same time; they share the cores.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Run on a Ray cluster; `local` starts one here."
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the table into this page.")
    ] = None,
    setting: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods on the same job, each run in a process; write a table and report.html.

    The same command goes on with a comparison that was interrupted.
    """
    from subspan.report import build_report
    from subspan.report.standings import failures, standings, write_section
    from subspan.report.standings import markdown as section
    from subspan.train.files import write_text
    from subspan.train.overrides import fields
    from subspan.train.race.config import compare_config
    from subspan.train.race.race import compare as run
    from subspan.train.race.watch import ConsoleWatcher
    from subspan.train.yamlfile import dump_yaml

    given = {"output": output and str(output), "workers": workers, "ray": ray}
    flags = {name: value for name, value in given.items() if value is not None}
    resolved = compare_config(config, fields({}, setting or ()) | flags)
    names = [name.strip() for name in methods.split(",")] if methods else None
    out = console(quiet)
    out.print(dump_yaml(resolved.model_dump(mode="json")), highlight=False, markup=False)
    with ConsoleWatcher(out) as watcher:
        results = run(resolved, names, watcher)
    folder = Path(resolved.output)
    write_text(folder / "report.html", build_report([folder]))
    out.print(standings(results))
    out.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    if markdown is not None:
        command = shlex.join(["subspan", *sys.argv[1:]])
        write_section(markdown, section(results, folder, command))
    failed = failures(results)
    if failed:
        fail("; ".join(failed), status=1)
