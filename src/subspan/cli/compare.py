"""`subspan compare`."""

from __future__ import annotations

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
    setting: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods on the same job, one after the other; write a table and report.html."""
    from subspan.report import build_report, load_runs
    from subspan.report.terminal import failures, results_table
    from subspan.train.comparison import compare as run
    from subspan.train.comparison import plan_arms
    from subspan.train.files import write_text
    from subspan.train.overrides import compare_config, fields
    from subspan.train.watch import ConsoleWatcher
    from subspan.train.yamlfile import dump_yaml

    resolved = compare_config(config, fields({}, setting or ()), output)
    names = [name.strip() for name in methods.split(",")] if methods else None
    arms = plan_arms(resolved, names)
    out = console(quiet)
    out.print(dump_yaml(resolved.model_dump(mode="json")), highlight=False, markup=False)
    with ConsoleWatcher(out, arms) as watcher:
        run(resolved, names, watcher)
    folder = Path(resolved.output)
    title, runs = load_runs([folder])
    write_text(folder / "report.html", build_report([folder]))
    out.print(results_table(runs, title))
    out.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    failed = failures(runs)
    if failed:
        fail("; ".join(failed), status=1)
