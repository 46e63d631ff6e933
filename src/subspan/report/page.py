"""The report: one HTML file that needs no network, readable in the dark and on a phone.

Text, table and bars are plain HTML, so they can be read without JavaScript; a small script, part
of the file, draws the curves at the width the page has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from subspan.report.details import configuration, software
from subspan.report.parts import charts, lead, method_cards, results
from subspan.report.runs import Run, load_runs

_COLOURS = 8
_POINTS = 400


def build_report(run_folders: Sequence[str | Path], title: str | None = None) -> str:
    """HTML of the report on run folders, or on the folder of a comparison.

    Args:
        run_folders: folders of runs (finished or not) and of comparisons.
        title: heading; none: the comparison's title.

    Raises:
        JobError: a folder holds no run.
    """
    found, runs = load_runs([Path(folder) for folder in run_folders])
    return render(runs, title or found or ("Comparison" if len(runs) > 1 else runs[0].name))


def render(runs: Sequence[Run], title: str) -> str:
    """HTML of the report on `runs`; the first finished one is what others are compared with."""
    here = Path(__file__).parent
    colours = {run.name: f"var(--c{index % _COLOURS})" for index, run in enumerate(runs)}
    body = [
        f"<h1>{escape(title)}</h1>",
        lead(runs),
        method_cards(runs, colours),
        charts(runs, colours),
        results(runs, colours),
        configuration(runs),
        software(runs),
    ]
    # "</" would end the script element that holds the data.
    data = json.dumps({"series": [series(run, colours[run.name]) for run in runs]})
    data = data.replace("</", "<\\/")
    content = "\n".join(part for part in body if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{(here / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{content}
</main>
<script type="application/json" id="data">{data}</script>
<script>
{(here / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def series(run: Run, colour: str) -> dict[str, Any]:
    """What the script needs of one run."""
    return {
        "name": run.name,
        "color": colour,
        "training": _points(run, "loss"),
        "validation": _points(run, "validation_loss"),
        "bytes": run.state_bytes,
        "loss": run.result["validation_loss"] if run.result else None,
    }


def _points(run: Run, field: str) -> list[dict[str, float]]:
    lines = [line for line in run.lines if field in line]
    # More points than pixels only make the file larger.
    stride = -(-len(lines) // _POINTS) or 1
    chosen = lines[::-1][::stride][::-1]
    return [
        {"tokens": line["tokens"], "seconds": line["seconds"], "loss": round(line[field], 4)}
        for line in chosen
    ]
