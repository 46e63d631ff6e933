"""Heatmaps of what the recorder wrote: rows are layers by kind, columns are steps."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from subspan.report.loading import Report
from subspan.report.runs import Run
from subspan.train.metrics import Line

MEASURES = {
    "overlap": (
        "Overlap between refreshes",
        "with the basis before: 1 means that the subspace stayed",
        1000,
    ),
    "energy": ("Captured gradient energy", "share of the gradient inside the subspace", 1000),
    "effective_rank": (
        "Effective rank",
        "directions that the gradient inside the subspace really uses",
        10,
    ),
}
"""Measure -> heading, note, and the factor with which values become whole numbers."""

_VALUES = 240_000  # of all heatmaps of a page: about a megabyte
_NUMBER = re.compile(r"^(.*?)\.?(\d+)\.(.+)$")


def heatmaps(report: Report) -> dict[str, Any] | None:
    """The heatmaps of every recorded run and the scales that they share; none without one."""
    runs = [(arm.name, run) for arm in report.arms for run in arm.runs if run.subspaces]
    if not runs:
        return None
    several = {name for name, _ in runs if [other for other, _ in runs].count(name) > 1}
    rows = sum(len({line["name"] for line in run.subspaces}) for _, run in runs)
    columns = max(2, _VALUES // (len(MEASURES) * max(1, rows)))
    return {
        "domains": {name: _domain(name, [run for _, run in runs]) for name in MEASURES},
        "factors": {name: factor for name, (_, _, factor) in MEASURES.items()},
        "runs": [
            heatmap(f"{name}, seed {run.seed}" if name in several else name, run, columns)
            for name, run in runs
        ],
    }


def heatmap(name: str, run: Run, columns: int) -> dict[str, Any]:
    """One run: rows in the order of the model within each kind of layer, and values row by row.

    Values are whole numbers (see MEASURES); -1 stands for what was not recorded or not defined.
    """
    lines = {(line["name"], line["step"]): line for line in run.subspaces}
    steps = _some(sorted({step for _, step in lines}), columns)
    rows = arrange(list(dict.fromkeys(line["name"] for line in run.subspaces)))
    about = {line["name"]: line for line in run.subspaces}
    return {
        "name": name,
        "steps": steps,
        "end": max(run.steps, steps[-1] + 1),
        "rows": [
            {**row, "shape": about[row["name"]]["shape"], "rank": about[row["name"]]["rank"]}
            for row in rows
        ],
        "values": {
            measure: [
                _whole(lines.get((row["name"], step)), measure, factor)
                for row in rows
                for step in steps
            ]
            for measure, (_, _, factor) in MEASURES.items()
        },
        "notes": {measure: _note(run.subspaces, measure) for measure in MEASURES},
    }


def arrange(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for parameters in the order of the model: grouped by kind, then by layer.

    `model.layers.3.mlp.up_proj.weight` is layer 3 of the kind `up_proj`, or `mlp.up_proj` where
    another kind ends alike.
    """
    parsed = {name: _parse(name) for name in names}
    kinds = list(dict.fromkeys(kind for kind, _ in parsed.values()))
    ends = [kind.rsplit(".", 1)[-1] for kind in kinds]
    labels = {
        kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)
    }
    order = sorted(names, key=lambda name: (kinds.index(parsed[name][0]), parsed[name][1]))
    return [
        {"name": name, "kind": labels[parsed[name][0]], "layer": parsed[name][1]} for name in order
    ]


def _parse(name: str) -> tuple[str, int]:
    """Kind and layer number; -1 for a parameter outside the numbered layers."""
    name = name.removesuffix(".weight")
    match = _NUMBER.match(name)
    return (match[3], int(match[2])) if match else (name, -1)


def _whole(line: Line | None, measure: str, factor: int) -> int:
    if line is None or line[measure] is None:
        return -1
    return round(line[measure] * factor)


def _some(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, the first and the last always."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _values(lines: Sequence[Line], measure: str) -> list[Line]:
    return [line for line in lines if line[measure] is not None]


def _domain(measure: str, runs: Sequence[Run]) -> list[float]:
    """Ends of the colour scale: shares to a tenth, ranks to a whole number, from 0 or 1."""
    values = [line[measure] for run in runs for line in _values(run.subspaces, measure)]
    if not values:
        return [0, 1]
    if measure == "effective_rank":
        return [0, math.ceil(max(values))]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10 - 1e-9) / 10
    return [low if high > low else max(0.0, low - 0.1), high]


def _note(lines: Sequence[Line], measure: str) -> str:
    """Median and lowest value in words, also for who cannot see the picture."""
    known = _values(lines, measure)
    if not known:
        return "not recorded"
    lowest = min(known, key=lambda line: line[measure])
    digits = 1 if measure == "effective_rank" else 2
    median = statistics.median(line[measure] for line in known)
    place = lowest["name"].removesuffix(".weight")
    return (
        f"median {median:.{digits}f}; lowest {lowest[measure]:.{digits}f} in {place} at step "
        f"{lowest['step']}"
    )
