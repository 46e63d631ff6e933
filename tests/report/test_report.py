"""The report: self-contained, complete, and drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from subspan.report import build_report, load_runs
from subspan.report.terminal import failures, results_table
from subspan.report.words import bytes_text, change_text, count_text, seconds_text
from subspan.train.errors import JobError

Build = Callable[..., Path]


def test_report_is_one_small_file_that_loads_nothing(comparison: Build) -> None:
    html = build_report([comparison()])
    assert len(html.encode()) < 500_000
    links = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert links <= {"http://www.w3.org/2000/svg"}  # A name, not an address.
    assert not re.search(r"<(link|img|iframe|script)[^>]+(src|href)=|@import|url\((?!#)", html)


def test_report_shows_results_failures_and_configuration(comparison: Build) -> None:
    html = build_report([comparison()])
    assert "Two &lt;methods&gt; &amp; a failure" in html
    assert "out of &lt;luck&gt;" in html
    assert "<luck>" not in html
    for text in ("200.34", "221.41", "+10.5 %", "42 MB", "18.9 MB", "−55.0 %", "first moment"):
        assert text in html, text
    assert "Same initial weights and text in every run" in html
    assert "<td>lr</td><td>0.01</td><td>0.02</td>" in html


def test_data_of_the_curves_is_valid_json_that_cannot_end_its_element(comparison: Build) -> None:
    html = build_report([comparison(title="</script>")])
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert found
    series = json.loads(found[1])["series"]
    assert [s["name"] for s in series] == ["adamw", "galore", "fira"]
    assert [len(s["validation"]) for s in series] == [5, 5, 0]
    assert series[0]["bytes"] == 42_000_000
    assert series[2]["loss"] is None


def test_runs_with_other_inputs_are_marked_as_not_comparable(comparison: Build) -> None:
    html = build_report([comparison(initial_weights_hash="other")])
    assert "losses cannot be compared" in html


def test_unfinished_run_is_shown_with_how_far_it_came(comparison: Build) -> None:
    folder = comparison() / "adamw"
    (folder / "result.json").unlink()
    html = build_report([folder])
    assert "not finished: step 100 of 1000" in html
    assert "No run is finished yet" in html


def test_folders_without_runs_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no run"):
        build_report([tmp_path])
    with pytest.raises(JobError, match="no run to report on"):
        build_report([])
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(JobError, match="is damaged"):
        build_report([tmp_path])


def test_terminal_table_has_a_row_for_every_run(comparison: Build) -> None:
    title, runs = load_runs([comparison()])
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(runs, title))
    text = console.export_text()
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert "200.34" in rows["adamw"]
    assert "+10.5 %" in rows["galore"]
    assert "failed" in rows["fira"]
    assert failures(runs) == ["fira: out of <luck>"]


def test_numbers_read_as_people_write_them() -> None:
    assert [bytes_text(n) for n in (0, 999, 1500, 42_092_544, 999_600_000, 26.95e9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "42.1 MB",
        "1000 MB",
        "26.9 GB",
    ]
    assert [count_text(n) for n in (400, 5_261_568, 1.2e9)] == ["400", "5.26 M", "1.2 G"]
    assert [seconds_text(n) for n in (3.21, 61, 3661)] == ["3.2 s", "1 min 01 s", "1 h 01 min"]
    assert [change_text(a, 100) for a in (103, 97, 100.01)] == ["+3.0 %", "−3.0 %", "±0.0 %"]


def _browser() -> str | None:
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


@pytest.mark.skipif(_browser() is None, reason="no browser: install chromium to run this test")
@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_browser_draws_every_curve_without_an_error(
    comparison: Build, tmp_path: Path, size: str
) -> None:
    page = tmp_path / "report.html"
    # Errors of the script become visible text, and a click shows that the table sorts.
    probe = """<script>
    window.onerror = (message) => { document.body.dataset.error = message; };
    window.onload = () => setTimeout(() => {
      document.querySelectorAll('#results th button')[1].click();
      document.querySelectorAll('#results th button')[1].click();
      document.body.dataset.first = document.querySelector('#results tbody tr').cells[0].innerText;
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    }, 300);
    </script>"""
    page.write_text(build_report([comparison()]).replace("<head>", "<head>" + probe))
    browser = _browser()
    assert browser
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
        flags += " --disable-background-networking --disable-component-update --dump-dom"
        command = [browser, *flags.split(), f"--window-size={size}", "--virtual-time-budget=4000"]
        command += [f"--user-data-dir={profile}", page.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "data-error" not in dom
    assert 'data-first="galore"' in dom  # Sorted by loss, largest first.
    assert 'data-wide="false"' in dom
    charts = re.findall(r'<div class="chart".*?</svg>', dom, flags=re.DOTALL)
    assert len(charts) == 3
    for chart in charts[:2]:
        assert len(re.findall(r'<path d="M', chart)) == 4  # Two runs, training and validation.
    assert charts[2].count("<circle") == 2
    assert all(name in chart for chart in charts for name in (">adamw<", ">galore<"))
