"""The page: one HTML file that needs no network, readable in the dark and on a phone.

Text, tables and bars are plain HTML, so they can be read without JavaScript; a script, part of the
file, draws charts and heatmaps at the width the page has. A content policy forbids every request
and every other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from subspan import __version__
from subspan.report.bars import clock_bars, planned_bars, state_bars
from subspan.report.details import configuration, software
from subspan.report.heat import heatmaps
from subspan.report.loading import Report, load
from subspan.report.parts import FEW, cards, charts, lead, legend, subspaces
from subspan.report.series import page_data
from subspan.report.tables import results, runs

_SCRIPTS = ("draw.js", "curves.js", "charts.js", "heat.js", "main.js")


def build_report(
    run_folders: Sequence[str | Path], title: str | None = None, report: Report | None = None
) -> str:
    """HTML of the report on run folders, or on folders of comparisons.

    Args:
        run_folders: folders of runs (finished or not) and of comparisons, or folders of those.
        title: heading; none: the comparison's title.
        report: what `load` made of the folders, if it is at hand.

    Raises:
        JobError: nothing of it can be shown.
    """
    return render(report or load([Path(folder) for folder in run_folders]), title)


def render(report: Report, title: str | None = None) -> str:
    """HTML of a report; the first arm with a result is what others are compared with."""
    heading = escape(title or report.title)
    heat = heatmaps(report)
    many = len([arm for arm in report.arms if arm.mean or any(run.lines for run in arm.runs)]) > FEW
    grid = pictures(report, many)
    sections = [
        f"<header><h1>{heading}</h1>{lead(report)}</header>",
        cards(report),
        legend(report),
        f'<div class="charts">{grid}</div>' if grid else "",
        subspaces(heat),
        results(report),
        runs(report),
        configuration(report),
        software(report),
        f"<footer>subspan {escape(__version__)}</footer>",
    ]
    # "</" would end the script element that holds the data.
    data = json.dumps(page_data(report, heat), separators=(",", ":"), allow_nan=False)
    data = data.replace("</", "<\\/")
    content = "\n".join(section for section in sections if section)
    code = script()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(code)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{heading}</title>
<style>
{_asset("report.css")}</style>
</head>
<body{' class="many"' if many else ""}>
<main>
{content}
</main>
<script type="application/json" id="data">{data}</script>
<script>{code}</script>
</body>
</html>
"""


def pictures(report: Report, many: bool) -> str:
    """Charts and bars in two columns."""
    found = charts(report)
    memory = [part for part in (state_bars(report), planned_bars(report)) if part]
    if len(found) % 2 and len(memory) > 1 and not (many or report.seeded):
        memory = [f'<div class="stack">{"".join(memory)}</div>']  # Together as high as a chart.
    return "".join(part for part in (*found, *memory, clock_bars(report)) if part)


def script() -> str:
    """The page's code."""
    parts = "\n".join(_asset(name) for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def policy(*scripts: str) -> str:
    """The content policy: nothing is loaded, and no script runs but the given ones."""
    digests = (hashlib.sha256(code.encode()).digest() for code in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in digests)
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
