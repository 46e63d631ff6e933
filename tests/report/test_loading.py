"""Torn, foreign and other-version folders: one clear line each, and the rest is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from subspan import cli
from subspan.report import build_report, load
from subspan.train.errors import JobError

Build = Callable[..., Path]


@pytest.fixture
def good(make: SimpleNamespace, tmp_path: Path) -> Path:
    done = make.result("galore", 5.0, make.states["galore"], 10)
    return make.run(tmp_path / "good", {"method": "galore"}, done)


def break_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("method: [galore\n")


def other_version(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text() + "tensorboard: true\n")


def foreign_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("services:\n  web: {image: nginx}\n")


def no_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def binary_config(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"\xff\xfe\x00\x80")


def no_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def a_file(folder: Path) -> None:
    no_folder(folder)
    folder.write_text("x")


def torn_race(folder: Path) -> None:
    (folder / "results.json").write_text('{"version": 2, "title"')
    no_config(folder)


def early_race(folder: Path) -> None:
    (folder / "results.json").write_text('{"title": "t", "arms": {}, "same_inputs": true}')


def later_race(folder: Path) -> None:
    (folder / "results.json").write_text('{"version": 3}')


def empty_race(folder: Path) -> None:
    (folder / "config.yaml").write_text("title: t\narms: {adamw: {}}\n")


NOT_SHOWN = {
    break_config: "is not valid YAML",
    other_version: "is of another version of subspan (tensorboard is not known here)",
    foreign_config: "holds no run: config.yaml is of another program",
    no_config: "holds no run (config.yaml is missing)",
    binary_config: "is not valid YAML",
    no_folder: "holds no run: it does not exist",
    a_file: "holds no run",
    torn_race: "results.json is damaged",
    early_race: "results.json is of an earlier version",
    later_race: "results.json is of another version",
    empty_race: "is a comparison that has not begun",
}


@pytest.mark.parametrize("damage", NOT_SHOWN, ids=lambda damage: damage.__name__)
def test_folder_that_cannot_be_read_is_a_line_and_a_row_beside_the_good(
    make: SimpleNamespace, good: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    bad = make.run(tmp_path / "bad", {"method": "fira"}, None)
    damage(bad)
    report = load([bad, good])
    (problem,) = report.problems
    assert NOT_SHOWN[damage] in problem
    assert str(bad) in problem
    assert "\n" not in problem
    assert [arm.name for arm in report.arms] == ["bad", "good"]
    assert report.arms[0].reason == problem
    assert report.arms[1].mean is not None
    html = build_report([bad, good])
    assert html.count("<tr data-arm") == 2
    with pytest.raises(JobError) as error:
        load([bad])
    assert str(error.value) == problem


def torn_result(folder: Path) -> None:
    (folder / "result.json").write_text('{"method": "fi')


def binary_result(folder: Path) -> None:
    (folder / "result.json").write_bytes(b"\xff\x00\xfe")


def other_result(folder: Path) -> None:
    values = json.loads((folder / "result.json").read_text())
    del values["peak_memory_bytes"]
    (folder / "result.json").write_text(json.dumps(values))


def list_result(folder: Path) -> None:
    (folder / "result.json").write_text("[1, 2]")


def torn_metrics(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[15] = lines[15][:20] + "\n"
    (folder / "metrics.jsonl").write_text("".join(lines))


def other_metrics(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:15], '{"epoch": 3}\n', *lines[15:]]))


def torn_subspaces(folder: Path) -> None:
    line = {"step": 1, "name": "a.0.b", "shape": [4, 4], "rank": 2, "overlap": None}
    lines = [json.dumps(line | {"energy": 0.5, "effective_rank": 1.5})] * 10
    (folder / "subspaces.jsonl").write_text("\n".join([*lines, "{", *lines]))


SHOWN_IN_PART = {
    torn_result: "result.json is damaged",
    binary_result: "result.json is damaged",
    other_result: "result.json is of another version of subspan (peak_memory_bytes",
    list_result: "result.json is of another version of subspan",
    torn_metrics: "metrics.jsonl is damaged from line 16 on",
    other_metrics: "metrics.jsonl is damaged from line 16 on",
    torn_subspaces: "subspaces.jsonl is damaged from line 11 on",
}


@pytest.mark.parametrize("damage", SHOWN_IN_PART, ids=lambda damage: damage.__name__)
def test_damage_inside_a_run_is_a_line_and_what_is_whole_is_shown(
    make: SimpleNamespace, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    done = make.result("fira", 5.0, make.states["galore"], 10)
    folder = make.run(tmp_path / "run", {"method": "fira"}, done)
    damage(folder)
    report = load([folder])
    (problem,) = report.problems
    assert SHOWN_IN_PART[damage] in problem
    (run,) = report.runs
    assert any("validation_loss" in line for line in run.lines)
    assert (run.result is None) == ("result.json" in problem)
    build_report([folder])


def test_last_line_that_a_crash_cut_short_is_no_problem(good: Path) -> None:
    path = good / "metrics.jsonl"
    before = load([good])
    path.write_text(path.read_text() + '{"step": 105, "tok')
    after = load([good])
    assert after.problems == ()
    assert after.runs[0].lines == before.runs[0].lines


def test_runs_below_a_torn_comparison_are_shown(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.search(tmp_path / "race", arms=2, seeds=2)
    (folder / "results.json").write_text("{")
    report = load([folder])
    assert len(report.problems) == 1
    names = [arm.name for arm in report.arms if arm.mean]
    assert len(names) == 4
    assert "galore/lr-0.01/seed-1" in names


def test_run_of_a_comparison_that_is_gone_keeps_its_row(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    folder = make.search(tmp_path / "race", arms=2, seeds=2)
    no_folder(folder / "adamw" / "lr-0.01" / "seed-1")
    report = load([folder])
    (problem,) = report.problems
    assert "seed-1 holds no run: it does not exist" in problem
    assert [arm.seeds for arm in report.arms] == [2, 2]
    assert report.arms[0].spread is not None


def test_folder_of_runs_shows_all_of_them(good: Path, tmp_path: Path, comparison: Build) -> None:
    comparison()
    report = load([tmp_path])
    assert [arm.name for arm in report.arms] == ["adamw", "galore", "fira", "good"]


def test_arms_of_two_comparisons_keep_apart(make: SimpleNamespace, tmp_path: Path) -> None:
    one, two = (make.search(tmp_path / name, arms=2, seeds=2) for name in ("one", "two"))
    report = load([one, two])
    names = [arm.name for arm in report.arms]
    assert names == ["adamw", "galore", "two/adamw", "two/galore"]
    assert {trial.arm for trial in report.trials} == set(names)
    assert set(report.clocks) == set(names)


def test_runs_of_the_same_name_are_told_apart(make: SimpleNamespace, tmp_path: Path) -> None:
    done = make.result("galore", 5.0, make.states["galore"], 10)
    for above in ("a", "b"):
        make.run(tmp_path / above / "run", {"method": "galore"}, done)
    report = load([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [arm.name for arm in report.arms] == ["a/run", "b/run"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["subspan", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_command_warns_in_one_line_each_and_shows_the_good(
    make: SimpleNamespace,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    torn = make.run(tmp_path / "torn", {"method": "fira"}, None)
    torn_result(torn)
    assert call(monkeypatch, foreign, torn, good) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"warning: folder {foreign} holds no run (config.yaml is missing); give a run folder",
        f"warning: {torn}/result.json is damaged; delete it and run again to finish the run",
    ]
    assert "148.41" in captured.out
    assert not (foreign / "report.html").exists()
    assert (torn / "report.html").exists()  # The first folder of which anything is shown.


def test_command_fails_only_if_nothing_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path / "none", tmp_path / "nothing") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: folder {tmp_path}/none holds no run: it does not exist",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "terminal", "opened"),
    [([], True, 1), ([], False, 0), (["--open"], False, 1), (["--no-open"], True, 0)],
)
def test_report_opens_in_the_browser_on_a_terminal(
    good: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], terminal: bool, opened: int
) -> None:
    addresses: list[str] = []
    monkeypatch.setattr("webbrowser.open", addresses.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    assert call(monkeypatch, good, *flags) == 0
    assert addresses == [(good / "report.html").resolve().as_uri()] * opened
