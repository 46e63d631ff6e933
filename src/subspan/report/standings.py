"""The table of a comparison, for the terminal and as a section of a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from subspan.report.words import bytes_text, change_text, seconds_text
from subspan.train.config import TrainConfig
from subspan.train.files import write_text
from subspan.train.race.results import ArmRow, Results

Cells = dict[str, str]


def _mean(arm: ArmRow, name: str, text: Callable[[float], str], spread: bool = False) -> str:
    if arm["mean"] is None:
        return "—"
    wide = f" ± {text(arm['spread'][name])}" if spread and arm["spread"] is not None else ""
    return text(arm["mean"][name]) + wide


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.split('.')[-1]} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )


def failures(results: Results) -> list[str]:
    """One line for each arm with a final run, or every trial, that failed."""
    return [f"{name}: {arm['failed']}" for name, arm in results["arms"].items() if arm["failed"]]


def rows(results: Results) -> dict[str, Cells]:
    """Column -> text for every arm; changes are against the first arm with a result.

    Columns that say nothing in this comparison are left out.
    """
    arms = results["arms"]
    reference = next((arm["mean"] for arm in arms.values() if arm["mean"] is not None), None)
    table = {}
    for name, arm in arms.items():
        mean = arm["mean"]
        cells = {"validation perplexity": _mean(arm, "perplexity", "{:.2f}".format, True)}
        if mean is not None and reference is not None:
            cells["change"] = change_text(mean["perplexity"], reference["perplexity"])
        else:
            cells["change"] = "—"
        cells["chosen"] = _settings(arm["settings"]) or "—"
        cells["optimizer state"] = _mean(arm, "state_bytes", bytes_text)
        cells["peak memory"] = _mean(arm, "peak_memory_bytes", bytes_text)
        cells["tokens/s"] = _mean(arm, "tokens_per_second", "{:,.0f}".format)
        cells["time"] = _mean(arm, "seconds", seconds_text)
        if results["clock"] is not None:
            timed = results["clock"]["arms"].get(name)
            cells["ms/step in turn"] = f"{timed['step_seconds'] * 1e3:,.1f}" if timed else "—"
        if len(results["seeds"]) > 1:
            cells["seeds"] = f"{arm['seeds']}/{len(results['seeds'])}"
        states = [run["state"] for run in results["runs"] if run["arm"] == name]
        if any(run["state"] == "failed" for run in results["runs"]):
            cells["failed runs"] = f"{states.count('failed')}/{len(states)}"
        table[name] = cells
    return table


# Two columns of the page share one of the terminal, one above the other; and their short names.
_SHORT = {
    "validation perplexity": "perplexity",
    "optimizer state": "state",
    "peak memory": "peak",
    "ms/step in turn": "ms/step\nin turn",
    "failed runs": "failed",
}
_STACKED = {
    "validation perplexity": "change",
    "optimizer state": "peak memory",
    "tokens/s": "time",
    "seeds": "failed runs",
}


def standings(results: Results) -> Table:
    """The table that ends a comparison on the terminal, narrow enough for any."""
    table = Table(
        title=results["title"],
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    cells = rows(results)
    columns = list(next(iter(cells.values()), {}))
    pairs = {top: _STACKED.get(top, "") for top in columns if top not in _STACKED.values()}
    if "failed runs" in columns and "seeds" not in columns:
        pairs["failed runs"] = ""
    pairs.pop("chosen", None)
    table.add_column("arm\nchosen", style="bold", no_wrap=True)
    for top, below in pairs.items():
        heads = [_SHORT.get(head, head) for head in (top, below) if head in columns]
        table.add_column("\n".join(heads), justify="right")
    for name, row in cells.items():
        first = Text(name).append(f"\n{row['chosen']}", style="not bold dim")
        values = [_stacked(row[top], row.get(below)) for top, below in pairs.items()]
        if results["arms"][name]["mean"] is None:
            values[0] = Text("failed", style="red")
        table.add_row(first, *values)
    return table


def _stacked(top: str, below: str | None) -> Text:
    return Text(top) if below is None else Text(top).append(f"\n{below}", style="dim")


def how(results: Results) -> str:
    """One paragraph on how the arms were compared."""
    search, seeds = results["search"], results["seeds"]
    start = (
        "Same text, and for each seed the same initial weights and order of data, in every run"
        if results["same_inputs"]
        else "The runs differ in text, initial weights or order of data, so losses cannot be "
        "compared"
    )
    sentences = [f"{results['tokens']:,} tokens each", start]
    if search is not None:
        sentences.append(
            f"{search['trials']} trials of every arm ({search['sampler']}) with seed "
            f"{search['seed']}, judged by validation loss"
        )
        if search["rungs"]:
            rungs = " and ".join(f"{step:,}" for step in search["rungs"])
            word = "steps" if len(search["rungs"]) > 1 else "step"
            sentences.append(
                f"After {word} {rungs} the best {search['keep']:.0%} went on".replace("%", " %")
            )
    if len(seeds) > 1:
        sentences.append(
            f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))} of the "
            "best trial's settings"
        )
    if results["clock"] is not None:
        sentences.append(
            f"ms/step in turn: median of {results['clock']['rounds']} steps, taken in turn by all "
            "arms in one process"
        )
    return ". ".join(sentences) + "."


def markdown(results: Results, folder: Path, command: str) -> str:
    """A section with heading, how it was made, and the table.

    Args:
        results: of the comparison.
        folder: of the comparison, for the configuration, versions and machine of a run.
        command: that makes it again.
    """
    from subspan.train import runfolder

    cells = rows(results)
    columns = list(next(iter(cells.values()), {}))
    lines = [f"## {results['title']}", "", f"`{command}`", ""]
    done = [folder / run["folder"] for run in results["runs"] if run["state"] == "finished"]
    result = runfolder.read_result(done[-1]) if done else None
    if result is not None:
        lines += [_setting(runfolder.read_config(done[-1]), result), ""]
    lines += [how(results), ""]
    lines += [f"| arm | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name, row in cells.items():
        lines.append(f"| {name} | {' | '.join(row.values())} |")
    failed = failures(results)
    if failed:
        lines += ["", "Failed: " + "; ".join(failed) + "."]
    return "\n".join(lines) + "\n"


def _setting(config: TrainConfig, result: Mapping[str, Any]) -> str:
    inputs, machine, versions = result["inputs"], result["machine"], result["versions"]
    corpus = config.data.corpus
    count = machine["threads"]
    threads = f"{count} thread{'s' if count > 1 else ''} per run"
    where = machine["gpu"] or f"{machine['cores']} cores, {threads}"
    return (
        f"{config.model} ({inputs['parameters']:,} parameters) on "
        f"{corpus if isinstance(corpus, str) else ', '.join(corpus)} (vocabulary "
        f"{inputs['vocabulary']:,}), sequences of {config.data.sequence_length}, "
        f"{config.batch_size * config.accumulation} per step, {config.dtype}; {where}, "
        f"torch {versions['torch']}, subspan {versions['subspan']}."
    )


def write_section(file: Path, section: str) -> None:
    """Put a section into a Markdown file: in the place of the one with its heading, else last."""
    heading = section.splitlines()[0]
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    start = lines.index(heading) if heading in lines else len(lines)
    after = next(
        (i for i in range(start + 1, len(lines)) if lines[i].startswith(("# ", "## "))), len(lines)
    )
    parts = ["\n".join(lines[:start]).strip(), section.strip(), "\n".join(lines[after:]).strip()]
    write_text(file, "\n\n".join(part for part in parts if part) + "\n")
