"""The numbers that the script of a page draws, small enough to open on a phone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from subspan.report.loading import Arm, Report
from subspan.report.runs import Run
from subspan.train.metrics import Line

POINTS = 400
"""At most so many points of one curve; more than a screen has pixels only make the file larger."""

_COLOURS, _MARKS = 8, 4
Columns = dict[str, list[float]]


def style(index: int) -> dict[str, Any]:
    """Colour, line and mark of the arm at `index`: 24 that differ, then again from the start."""
    return {
        "color": f"var(--c{index % _COLOURS})",
        "line": index // _COLOURS % 3,
        "mark": index % _MARKS,
    }


def page_data(report: Report, heat: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that the script needs."""
    return {
        "arms": [
            {
                "name": arm.name,
                **style(index),
                "validation": _thinned(averaged(arm, "validation_loss")),
                "training": _binned(averaged(arm, "loss")),
                "bytes": arm.mean["state_bytes"] if arm.mean else None,
                "loss": arm.mean["validation_loss"] if arm.mean else None,
                "spread": arm.spread["validation_loss"] if arm.spread else None,
                "seeds": _seeds(arm),
            }
            for index, arm in enumerate(report.arms)
        ],
        "trials": sensitivity(report),
        "heat": heat,
    }


def averaged(arm: Arm, field: str) -> Columns:
    """One curve of an arm: mean over its finished runs at the steps that they share.

    Without a finished run it is that of the run that came furthest. `spread` is the sample standard
    deviation, where there are several runs.
    """
    runs = [run for run in arm.runs if run.result] or sorted(arm.runs, key=_length)[-1:]
    tables = [{line["step"]: line for line in run.lines if field in line} for run in runs]
    tables = [table for table in tables if table]
    columns: Columns = {"tokens": [], "seconds": [], "loss": []}
    if len(tables) > 1:
        columns["spread"] = []
    for step in tables[0] if tables else ():
        lines = [table[step] for table in tables if step in table]
        if len(lines) < len(tables):
            continue
        losses = [line[field] for line in lines]
        columns["tokens"].append(lines[0]["tokens"])
        columns["seconds"].append(round(statistics.fmean(line["seconds"] for line in lines), 2))
        columns["loss"].append(round(statistics.fmean(losses), 4))
        if len(lines) > 1:
            columns["spread"].append(round(statistics.stdev(losses), 4))
    return columns


def _length(run: Run) -> int:
    return len(run.lines)


def _thinned(columns: Columns) -> Columns:
    """Every k-th point, the last one always."""
    stride = -(-len(columns["loss"]) // POINTS) or 1
    return {name: values[::-1][::stride][::-1] for name, values in columns.items()}


def _binned(columns: Columns) -> Columns:
    """Means of k neighbours: training loss is noisy, and picked points would show that alone."""
    size = -(-len(columns["loss"]) // POINTS) or 1
    return {
        name: [
            round(statistics.fmean(values[i : i + size]), 0 if name == "tokens" else 4)
            for i in range(0, len(values), size)
        ]
        if size > 1
        else values
        for name, values in columns.items()
        if name != "spread"
    }


def _seeds(arm: Arm) -> list[tuple[int, float]]:
    """Seed and final loss of each finished run, if there are several."""
    done = [(run.seed or 0, run.result["validation_loss"]) for run in arm.runs if run.result]
    return done if len(done) > 1 else []


def sensitivity(report: Report) -> list[dict[str, Any]]:
    """Learning rate and last validation loss of every trial."""
    indices = {arm.name: index for index, arm in enumerate(report.arms)}
    chosen = {(arm.name, run.trial) for arm in report.arms for run in arm.runs if run.trial}
    return [
        {
            "arm": indices[trial.arm],
            "lr": trial.settings["lr"],
            "rest": settings_text({k: v for k, v in trial.settings.items() if k != "lr"}),
            "loss": trial.loss,
            "state": trial.state,
            "chosen": (trial.arm, trial.trial) in chosen,
            "reason": trial.reason or "",
        }
        for trial in report.trials
        if trial.arm in indices and isinstance(trial.settings.get("lr"), int | float)
    ]


def settings_text(settings: Mapping[str, Any] | None) -> str:
    """lr 0.01, rank 64."""
    return ", ".join(
        f"{name.split('.')[-1]} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in (settings or {}).items()
    )


def has_curves(report: Report) -> bool:
    """Whether any run was evaluated."""
    lines: Iterable[Sequence[Line]] = (run.lines for arm in report.arms for run in arm.runs)
    return any("validation_loss" in line for each in lines for line in each)
