"""The report: self-contained, complete, and safe whatever the names are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from subspan.report import build_report, load
from subspan.report.heat import arrange, heatmaps
from subspan.report.page import policy, script
from subspan.report.series import POINTS, averaged, page_data, sensitivity, style
from subspan.report.terminal import failures, results_table
from subspan.report.words import bytes_text, change_text, count_text, seconds_text

Build = Callable[..., Path]


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_report_is_one_small_file_that_loads_nothing(comparison: Build) -> None:
    html = build_report([comparison()])
    assert len(html.encode()) < 500_000
    links = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert links <= {"http://www.w3.org/2000/svg"}  # A name, not an address.
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\bsrc=|@import|url\((?!#)", html)
    assert "url(#" not in html.split("<script")[0]
    assert f'content="{policy(script())}"' in html
    assert "default-src 'none'" in policy(script())


def test_report_shows_results_failures_and_configuration(comparison: Build) -> None:
    html = build_report([comparison()])
    assert "Two &lt;methods&gt; &amp; a failure" in html
    assert "out of &lt;luck&gt;" in html
    assert "<luck>" not in html
    for text in ("200.34", "221.41", "+10.5 %", "42 MB", "18.9 MB", "−55.0 %", "first moment"):
        assert text in html, text
    assert "<td>lr</td><td>0.01</td><td>0.02</td>" in html
    # Planned: 42 MB of weights and gradients, then the states.
    assert "60.9 MB <small>of 700 MB peak</small>" in html
    assert "versions" in html and "torch 2" in html


def test_data_of_the_curves_is_valid_json_that_cannot_end_its_element(comparison: Build) -> None:
    data = data_of(build_report([comparison(title="</script>")]))
    assert [arm["name"] for arm in data["arms"]] == ["adamw", "galore", "fira"]
    assert [len(arm["validation"]["loss"]) for arm in data["arms"]] == [5, 5, 0]
    assert data["arms"][0]["bytes"] == 42_000_000
    assert data["arms"][2]["loss"] is None


def test_runs_with_other_inputs_are_marked_as_not_comparable(comparison: Build) -> None:
    html = build_report([comparison(initial_weights_hash="other")])
    assert "losses cannot be compared" in html


def test_unfinished_run_is_shown_with_how_far_it_came(comparison: Build) -> None:
    folder = comparison() / "adamw"
    (folder / "result.json").unlink()
    html = build_report([folder])
    assert "not finished: step 100 of 1000" in html
    assert "No run is finished yet" in html
    assert len(data_of(html)["arms"][0]["validation"]["loss"]) == 5


def test_curve_of_an_arm_is_the_mean_over_its_seeds(make: SimpleNamespace, tmp_path: Path) -> None:
    report = load([make.search(tmp_path / "race", arms=2, seeds=3)])
    arm = report.arms[0]
    curve = averaged(arm, "validation_loss")
    ends = [run.lines[-1]["validation_loss"] for run in arm.runs]
    assert len(ends) == 3
    mean = sum(ends) / 3
    assert curve["loss"][-1] == pytest.approx(mean, abs=1e-4)
    deviation = math.sqrt(sum((end - mean) ** 2 for end in ends) / 2)
    assert curve["spread"][-1] == pytest.approx(deviation, abs=1e-4)
    html = build_report([tmp_path / "race"])
    perplexity = [run.result["perplexity"] for run in arm.runs if run.result]
    assert f"{sum(perplexity) / 3:.2f} <span" in html
    assert "3 seeds" in html


def test_training_curve_keeps_its_mean_when_it_is_thinned(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    done = make.result("galore", 5.0, make.states["galore"], 10)
    lines = make.metrics(5.0, 3000, 1, 100)
    folder = make.run(tmp_path / "run", {"method": "galore", "steps": 3000}, done, lines)
    arm = data_of(build_report([folder]))["arms"][0]
    losses = [line["loss"] for line in lines if "loss" in line]
    drawn = arm["training"]["loss"]
    assert len(drawn) == 375 <= POINTS  # Means of eight neighbours.
    assert sum(drawn) / len(drawn) == pytest.approx(sum(losses) / len(losses), abs=1e-3)
    assert arm["validation"]["loss"][-1] == round(lines[-1]["validation_loss"], 4)
    assert arm["validation"]["tokens"] == [1024 * step for step in range(100, 3001, 100)]


def test_every_trial_of_the_search_is_a_point_with_what_became_of_it(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    folder = make.search(tmp_path / "race", arms=2, seeds=2)
    points = sensitivity(load([folder]))
    rows = json.loads((folder / "results.json").read_text())["runs"]
    rows = [row for row in rows if row["seed"] == 0]
    assert [(p["lr"], p["loss"], p["state"]) for p in points] == [
        (row["settings"]["lr"], row["validation_loss"], row["state"]) for row in rows
    ]
    assert [p["chosen"] for p in points] == [row["trial"] == "lr-0.01" for row in rows]
    assert {p["state"] for p in points} == {"finished", "stopped", "failed"}
    html = build_report([folder])
    assert "training diverged: loss is nan at step 60" in html
    assert "pruned at rung 50" in html
    # One row for each run: five rates of each of two arms, and a second seed of each winner.
    table = html.split('id="runs"')[1].split("</table>")[0]
    assert table.count("<tr data-arm") == 12


def test_rows_of_a_heatmap_are_layers_of_one_kind_in_the_order_of_the_model() -> None:
    names = [
        f"model.layers.{layer}.{kind}.weight"
        for layer in (0, 1, 10, 2)
        for kind in ("self_attn.q_proj", "mlp.up_proj", "shared.up_proj")
    ]
    rows = arrange([*names, "head.weight"])
    assert [(row["kind"], row["layer"]) for row in rows[:5]] == [
        ("q_proj", 0),
        ("q_proj", 1),
        ("q_proj", 2),
        ("q_proj", 10),
        ("mlp.up_proj", 0),
    ]
    assert rows[-1] == {"name": "head.weight", "kind": "head", "layer": -1}
    assert sorted(row["name"] for row in rows) == sorted([*names, "head.weight"])


def test_heatmap_holds_every_recorded_number(make: SimpleNamespace, tmp_path: Path) -> None:
    lines = make.subspaces(make.steps, 25, 3)
    done = make.result("galore", 5.0, make.states["galore"], 10)
    folder = make.run(tmp_path / "run", {"method": "galore"}, done, recorded=lines)
    heat = heatmaps(load([folder]))
    assert heat is not None
    (run,) = heat["runs"]
    assert run["steps"] == [1, 26, 51, 76]
    assert run["end"] == make.steps
    table = {(line["name"], line["step"]): line for line in lines}
    for measure, factor in heat["factors"].items():
        values = iter(run["values"][measure])
        for row in run["rows"]:
            for step in run["steps"]:
                value, expected = next(values), table[row["name"], step][measure]
                assert value == (-1 if expected is None else round(factor * expected))
        known = [line[measure] for line in lines if line[measure] is not None]
        low, high = heat["domains"][measure]
        assert low <= min(known) and max(known) <= high
        assert f"lowest {min(known):.{1 if factor == 10 else 2}f}" in run["notes"][measure]


def test_long_recordings_are_thinned_and_keep_both_ends(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    folders = []
    for number in range(3):
        done = make.result("galore", 5.0, make.states["galore"], 10)
        recorded = make.subspaces(30_000, 20, 2, seed=number)
        values = {"method": "galore"}
        folders.append(make.run(tmp_path / f"run{number}", values, done, recorded=recorded))
    heat = heatmaps(load(folders))
    assert heat is not None
    assert [run["steps"][0] for run in heat["runs"]] == [1, 1, 1]
    assert [run["steps"][-1] for run in heat["runs"]] == [29_981] * 3
    assert len(json.dumps(heat)) < 1_500_000


def test_terminal_table_has_a_row_for_every_arm(comparison: Build) -> None:
    report = load([comparison()])
    text = shown(results_table(report))
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert "200.34" in rows["adamw"]
    assert "+10.5 %" in rows["galore"]
    assert "failed" in rows["fira"]
    assert failures(report) == ["fira: out of <luck>"]
    assert shown(results_table(comparison())) == text


def test_terminal_table_of_several_seeds_has_mean_and_spread(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    folder = make.search(tmp_path / "race", arms=1, seeds=3)
    row = json.loads((folder / "results.json").read_text())["arms"]["adamw"]
    expected = f"{row['mean']['perplexity']:.2f} ± {row['spread']['perplexity']:.2f}"
    assert expected in shown(results_table(folder))


def shown(table: Any) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


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


def test_twenty_runs_differ_in_colour_line_or_mark() -> None:
    assert len({tuple(style(index).values()) for index in range(24)}) == 24


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_in_every_colour_has_enough_contrast(theme: int) -> None:
    """WCAG 2.2 AA: 4.5 : 1 for text, against cards and against the page."""
    css = (Path(build_report.__code__.co_filename).parent / "report.css").read_text()
    block = css.split(":root {")[1 + theme].split("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    arms = {name for name in colours if re.fullmatch(r"c\d", name)}
    assert len(arms) == 8
    for ground in ("card", "page"):
        for name in {"ink", "soft", "good", "bad"} | (arms if ground == "card" else set()):
            a, b = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (name, ground)


def test_page_data_holds_nothing_that_json_forbids(comparison: Build) -> None:
    json.dumps(page_data(load([comparison()]), None), allow_nan=False)
