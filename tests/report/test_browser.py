"""The report in a real browser: every picture has its data, nothing fails, nothing is loaded."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subspan.report import build_report
from subspan.report.page import policy, script

Build = Callable[..., Path]
Page = dict[str, Any]

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium")

PHONE, DESK = (360, 800), (1200, 900)

# Runs before the page's own script; what it sees becomes an attribute that the test reads.
PROBE = """
const seen = { errors: [], violations: [] };
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.blockedURI));
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const points = (path) => (path.getAttribute("d").match(/[ML]/g) ?? []).length;
addEventListener("load", () => setTimeout(() => {
  seen.loaded = performance.getEntriesByType("resource").length;
  seen.milliseconds = performance.timing.loadEventEnd - performance.timing.navigationStart;
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  seen.charts = all(".chart").map((chart) => ({
    x: chart.dataset.x,
    label: chart.querySelector("svg").getAttribute("aria-label"),
    lines: all("path.validation, path.training, path.band", chart).map((path) => [
      +path.closest("g").dataset.arm, path.getAttribute("class"), points(path)]),
    marks: all(".mark, .pruned, .failed, .seed", chart).map((node) =>
      [+node.closest("g").dataset.arm, node.getAttribute("class")]),
    names: all(".name", chart).map((node) => {
      const { left, top, right, bottom } = node.getBoundingClientRect();
      const box = chart.closest(".card").getBoundingClientRect();
      return { text: node.textContent, left, top, right, bottom,
        inside: left >= box.left && right <= box.right && top >= box.top && bottom <= box.bottom };
    }),
  }));
  const select = document.querySelector("#heat select");
  seen.heat = (select ? all("option", select) : document.querySelector("#heat") ? [null] : [])
    .map((option, index) => {
      if (select) { select.selectedIndex = index; select.dispatchEvent(new Event("change")); }
      return Object.fromEntries(all("#heat figure").map((figure) => {
        const canvas = figure.querySelector("canvas");
        const colours = new Set(), area = index < 3 ? [canvas.width, canvas.height] : [1, 1];
        const { data } = canvas.getContext("2d").getImageData(0, 0, ...area);
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255)
          colours.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
        return [figure.dataset.measure, { cells: +canvas.dataset.cells, colours: colours.size,
          label: canvas.getAttribute("aria-label"),
          scale: all(".scale span", figure).map((end) => +end.textContent) }];
      }));
    });
  seen.bars = all(".bars").map((bars) => all(".bar", bars).map((bar) =>
    [bar.querySelector("b").textContent, all(".track span", bar).map((part) =>
      part.getBoundingClientRect().width / bar.querySelector(".track").clientWidth)]));
  const column = () => all("#results tbody tr").map((row) => row.cells[0].innerText.trim());
  const heads = all("#results th button");
  const loss = heads.find((head) => head.textContent === "validation loss");
  loss.click(); seen.up = column();
  loss.click(); seen.down = column();
  seen.sorted = loss.parentElement.getAttribute("aria-sort");
  const button = document.querySelector(".legend button:nth-child(2)");
  button?.click();
  seen.pressed = button?.getAttribute("aria-pressed") ?? null;
  seen.faded = all("path.validation").map((path) => path.closest("g").classList.contains("off"));
  seen.unnamed = all("svg[role=img], canvas, [role=img], [role=region], [role=group], select")
    .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length)).length
    + all("button").filter((node) => !node.innerText.trim()).length;
  document.body.dataset.seen = JSON.stringify(seen);
}, 300));
"""


def visit(page: str, folder: Path, size: tuple[int, int], dark: bool = False) -> Page:
    """Open the page without a network; what the probe saw, and what the browser complained of."""
    # The probe is let in by its hash, so the page's own policy is in force for all else.
    page = page.replace(policy(script()), policy(script(), PROBE))
    page = page.replace("<title>", f"<script>{PROBE}</script><title>", 1)
    file = folder / "page.html"
    file.write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    flags += " --enable-logging=stderr --virtual-time-budget=4000"
    command = [str(BROWSER), *flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
        command += [file.as_uri()]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        seconds = time.perf_counter() - started
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    # All but a piece of advice to the probe.
    lines = [line for line in done.stderr.splitlines() if "Multiple readback" not in line]
    console = [line for line in lines if "CONSOLE" in line]
    seen: Page = json.loads(html.unescape(found[1])) if found else {}
    return seen | {"console": console, "wall": seconds, "bytes": len(page.encode())}


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def assert_sound(seen: Page) -> None:
    """What holds for every page."""
    assert "charts" in seen, seen["console"]
    assert seen["console"] == []
    assert seen["errors"] == []
    assert seen["violations"] == []
    assert seen["loaded"] == 0
    assert seen["wide"] is False
    assert seen["unnamed"] == 0
    for chart in seen["charts"]:
        assert chart["label"]
        for one, other in itertools.combinations(chart["names"], 2):
            apart = (
                one["right"] <= other["left"]
                or other["right"] <= one["left"]
                # Lines of text have room above and below their letters.
                or one["bottom"] - 3 <= other["top"]
                or other["bottom"] - 3 <= one["top"]
            )
            assert apart, (chart["x"], one, other)
        assert all(name["inside"] for name in chart["names"]), chart


def assert_every_picture_has_its_data(seen: Page, data: dict[str, Any]) -> None:
    arms = data["arms"]
    expected = []
    for index, arm in enumerate(arms):
        validation, count = arm["validation"], len(arm["validation"]["loss"])
        if not count:
            continue
        if validation.get("spread"):
            expected.append([index, "band", 2 * count])
        if arm["training"]["loss"]:
            expected.append([index, "training", len(arm["training"]["loss"])])
        expected.append([index, "validation", count])
    charts = {chart["x"]: chart for chart in seen["charts"]}
    for x in ("tokens", "seconds"):
        assert charts[x]["lines"] == expected
    if "bytes" in charts:
        placed = [index for index, arm in enumerate(arms) if arm["bytes"] is not None]
        assert charts["bytes"]["marks"] == [[index, "mark"] for index in placed]
    if data["trials"]:
        kinds = {"finished": "trial mark", "stopped": "trial pruned", "failed": "trial failed"}
        trials = sorted([trial["arm"], kinds[trial["state"]]] for trial in data["trials"])
        assert sorted(charts["lr"]["marks"]) == trials
    if any(arm["seeds"] for arm in arms):
        marks = [[i, "seed"] for i, arm in enumerate(arms) for _ in arm["seeds"]]
        assert sorted(charts["loss"]["marks"]) == marks
    runs = data["heat"]["runs"] if data["heat"] else []
    assert len(seen["heat"]) == len(runs)
    for number, (drawn, run) in enumerate(zip(seen["heat"], runs, strict=True)):
        for measure, values in run["values"].items():
            known = [value for value in values if value >= 0]
            assert drawn[measure]["cells"] == len(known) > 0
            if number < 3:
                assert drawn[measure]["colours"] >= min(10, len(set(known)))
            assert run["notes"][measure] in drawn[measure]["label"]
            assert drawn[measure]["scale"] == pytest.approx(data["heat"]["domains"][measure])


def test_probe_would_see_an_error_and_a_request(comparison: Build, tmp_path: Path) -> None:
    page = build_report([comparison()])
    bad = page.replace(
        "</main>", '</main><img src="https://example.org/a.png"><script>x()</script>'
    )
    seen = visit(bad, tmp_path, DESK)
    assert "https://example.org/a.png" in seen["violations"]
    assert "inline" in seen["violations"]  # A script that is not the page's own does not run.
    assert len(seen["console"]) >= 2


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_comparison_with_a_failure(
    comparison: Build, tmp_path: Path, size: tuple[int, int], dark: bool
) -> None:
    page = build_report([comparison()])
    seen = visit(page, tmp_path, size, dark)
    assert_sound(seen)
    assert_every_picture_has_its_data(seen, data_of(page))
    assert seen["up"] == ["adamw", "galore", "fira"]
    assert seen["down"] == ["galore", "adamw", "fira"]  # What has no loss stays last.
    assert seen["sorted"] == "descending"
    assert seen["pressed"] == "true"
    assert seen["faded"] == [True, False, True, False]
    state = dict(seen["bars"][0])
    assert state["adamw"] == pytest.approx([0.5, 0.5], abs=0.01)
    assert state["galore"] == pytest.approx([9 / 42, 9 / 42, 0.9 / 42], abs=0.01)


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_search_with_seeds_clock_and_heatmaps(
    make: SimpleNamespace, tmp_path: Path, size: tuple[int, int]
) -> None:
    page = build_report([make.search(tmp_path / "race", arms=4, seeds=3)])
    data = data_of(page)
    seen = visit(page, tmp_path, size)
    assert_sound(seen)
    assert_every_picture_has_its_data(seen, data)
    assert [chart["x"] for chart in seen["charts"]] == ["tokens", "seconds", "bytes", "lr", "loss"]
    assert len(data["heat"]["runs"]) == 3
    # Optimizer state, memory of training, time of a step.
    assert [len(bars) for bars in seen["bars"]] == [4, 4, 4]


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_single_run_with_heatmaps(
    make: SimpleNamespace, tmp_path: Path, size: tuple[int, int]
) -> None:
    done = make.result("galore", 5.0, make.states["galore"], 10)
    recorded = make.subspaces(100, 10, 3)
    page = build_report([make.run(tmp_path / "r", {"method": "galore"}, done, None, recorded)])
    seen = visit(page, tmp_path, size)
    assert_sound(seen)
    assert_every_picture_has_its_data(seen, data_of(page))
    # 21 layers, ten refreshes; the first has no basis before it to overlap with.
    assert seen["heat"][0]["energy"]["cells"] == 210
    assert seen["heat"][0]["overlap"]["cells"] == 189


def test_page_with_nothing_but_rows_of_failures(tmp_path: Path, make: SimpleNamespace) -> None:
    folder = make.run(tmp_path / "run", {"method": "galore"}, None)
    (folder / "metrics.jsonl").write_text("")
    seen = visit(build_report([folder]), tmp_path, PHONE)
    assert_sound(seen)
    assert seen["charts"] == []
    assert seen["up"] == ["run"]


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_awkward_runs(make: SimpleNamespace, tmp_path: Path, size: tuple[int, int]) -> None:
    """Long names, no state, one evaluation, one recorded step, 224 layers, equal losses."""
    folders = []
    for index, state in enumerate(({}, {"first_moment": 1}, {"error": 10**12})):
        done = make.result("galore", 5.0, state, 10)
        name = f"{'a-very-long-name-' * 3}{index}<b>&amp;"
        lines = make.metrics(5.0, 100, 10, 100 if index else 20)
        recorded = make.subspaces(100, 200 if index else 20, 32 if index == 2 else 1)
        folder = make.run(tmp_path / name, {"method": "galore"}, done, lines, recorded)
        folders.append(folder)
    page = build_report(folders)
    data = data_of(page)
    seen = visit(page, tmp_path, size)
    assert [len(run["rows"]) for run in data["heat"]["runs"]] == [7, 7, 224]
    # A single refresh has nothing to overlap with.
    for run, drawn in zip(data["heat"]["runs"][1:], seen["heat"][1:], strict=True):
        assert drawn["overlap"]["cells"] == 0
        assert "not recorded" in drawn["overlap"]["label"]
        assert drawn["energy"]["cells"] == len(run["rows"])
    assert_sound(seen)


@pytest.mark.slow
def test_twenty_runs_of_two_thousand_points_open_fast(
    make: SimpleNamespace, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folders = []
    for index in range(20):
        state = {"first_moment": 21_000_000 // (1 + index % 7), "second_moment": 9_000_000}
        done = make.result("galore", 4.6 + 0.03 * index, state, 200 + index)
        lines = make.metrics(done["validation_loss"], 2000, 1, 100, index)
        recorded = make.subspaces(2000, 20, 12, seed=index)
        values = {"method": "galore", "steps": 2000, "lr": 0.001 * (index + 1)}
        folders.append(make.run(tmp_path / f"run-{index}", values, done, lines, recorded))
    page = build_report(folders)
    for size in (PHONE, DESK):
        seen = visit(page, tmp_path, size)
        assert_sound(seen)
        assert_every_picture_has_its_data(seen, data_of(page))
        assert seen["bytes"] < 3_000_000
        # The bar is two seconds; a machine that runs other tests may be slower.
        assert seen["milliseconds"] < 8000
        record_property(f"open_milliseconds_{size[0]}", seen["milliseconds"])
        print(f"{size}: {seen['bytes']:,} bytes, {seen['milliseconds']} ms, {seen['wall']:.1f} s")
