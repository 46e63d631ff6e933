"""`subspan plan`: tables, files, and one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_names_counting_rule_and_baseline(run):
    status, out, err = run("--model", "60m", "--method", "galore", "--rank", 128)
    assert (status, err) == (0, "")
    assert "GB = 10^9 bytes, GiB = 2^30" in out and "bases (projectors) are counted" in out
    assert "AdamW in bfloat16 on the whole model" in out
    assert "states -29.5 %" in out
    for part in ("weights", "gradients", "first moments", "bases", "activations", "peak"):
        assert part in out


def test_all_methods_have_a_row_and_the_unplannable_a_line(run, folder):
    status, out, _ = run("--model", folder("llama"), "--method", "all", "--int8-weights")
    assert status == 0
    assert "galore (rank 128)" in out and "q_galore" in out
    assert "not planned: method swats" in out and "needs exact weights" in out


def test_json_and_picture_agree_with_each_other(run, folder, tmp_path):
    numbers, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    status, _, err = run(
        "--model", folder("llama"), "--method", "galore,adamw", "--rank", "8", "--quiet",
        "--json", numbers, "--picture", picture,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "no option 'rank'" in json.loads(numbers.read_text())["failed"]["adamw"]
    status, out, _ = run(
        "--model", folder("llama"), "--method", "galore,adamw", "--quiet",
        "--json", numbers, "--picture", picture,
    )  # fmt: skip
    assert (status, out) == (0, "")
    plans = json.loads(numbers.read_text())["plans"]
    root = ElementTree.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    bars: dict[str, float] = {}
    for rectangle in root.iter(f"{space}rect"):
        title = rectangle.find(f"{space}title")
        if title is not None:
            bars.setdefault(rectangle.get("y"), 0.0)
            bars[rectangle.get("y")] += float(rectangle.get("width"))
    widths = list(bars.values())
    peaks = sorted(plan["bytes"]["peak"] for plan in plans)
    assert widths[1] / widths[0] == pytest.approx(peaks[1] / peaks[0], rel=0.01)


def test_a_png_needs_matplotlib_and_is_one(run, folder, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert run("--model", folder("llama"), "--quiet", "--picture", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_budget_ends_in_a_command(run, folder, tmp_path):
    numbers = tmp_path / "search.json"
    status, out, _ = run(
        "--model", folder("llama"), "--method", "galore,adamw", "--budget", "1GB", "--json", numbers
    )
    assert status == 0 and "subspan train --model" in out
    assert "Best of what fits into 1.000 (0.931) GB" in out
    values = json.loads(numbers.read_text())["search"]
    assert values["best"] == "adamw" and values["command"].startswith("subspan train")
    status, out, _ = run("--model", folder("llama"), "--method", "galore", "--budget", "100kB")
    assert status == 0 and "Nothing fits" in out and "what would have to give" in out


def test_a_training_configuration_is_planned(run, folder, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {folder('llama')}\nmethod: fira\nrank: 8\nbatch_size: 3\n"
        "data: {sequence_length: 32, vocab_size: 400}\nmethod_options: {alpha: 0.5}\n"
        "activation_checkpointing: true\n"
    )
    status, out, err = run("--config", file)
    assert (status, err) == (0, "")
    assert (
        "float32, 3 x 32 tokens per pass, activations recomputed" in out
        and "fira (alpha 0.5, rank 8)" in out
    )
    assert "batch" not in err and run("--config", file, "--batch-size", 5)[1].count("5 x 32") == 1


BAD = {
    "--model nothing": "unknown model 'nothing': not a folder",
    "--method galore": "name a model",
    "--model 60m --method galor": "did you mean 'galore'?",
    "--model 60m --rank many": "--rank 'many' must be an integer",
    "--model 60m --budget lots": "--budget 'lots' is no size",
    "--model 60m --budget -3GB": "is no size",
    "--model 60m --dtype int7": "--dtype 'int7' must be one of float32",
    "--model 60m --attention fast": "--attention 'fast' must be one of",
    "--model 60m --batch-size 0": "batch_size=0 must be at least 1",
    "--model 60m --ranks 0": "ranks=0 must be at least 1",
    "--model 60m --clipping each": "needs update_in_backward",
    "--model 60m --base-weights int8": "needs --adapter",
    "--model 60m --option density": "write KEY=VALUE",
    "--model 60m --storage int9": "storage='int9' is not known",
    "--model 60m --adapter nowhere": "cannot read adapter configuration",
    "--model missing.module:make": "No module named 'missing'",
    "--model os:sep": "'str' object is not callable",
    "--model 60m --measure --method all": "--measure runs one method",
    "--model 60m --picture plan.gif": "must end in .svg or .png",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(run, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*flags.split(), "--quiet")
    assert status == 2 and len(err.splitlines()) == 1
    assert BAD[flags] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[]", "no model_type"),
        ('{"model_type": "of_tomorrow"}', "cannot build model_type 'of_tomorrow'"),
        ('{"model_type": "llama", "hidden_size": -4}', "cannot build model"),
    ],
)
def test_a_configuration_that_transformers_cannot_build_is_one_line(run, tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "config.json"):
        status, _, err = run("--model", source)
        assert status == 2 and len(err.splitlines()) == 1 and words in err


def test_too_long_sequences_are_refused(run, folder):
    status, _, err = run("--model", folder("gpt2"), "--sequence-length", 2000)
    assert status == 2 and "exceeds the 1024 positions" in err


def test_a_model_that_does_not_fit_here_is_not_measured(run):
    status, _, err = run("--model", "70b", "--measure")
    assert status == 2 and "GB are free here" in err


def test_help_is_instant():
    best = min(_seconds() for _ in range(3))
    assert best < 1.0


def _seconds() -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "subspan", "plan", "--help"], check=True, capture_output=True
    )
    return time.perf_counter() - start


@pytest.mark.slow
def test_seventy_billion_parameters_over_all_methods_take_ten_seconds_and_a_gigabyte(tmp_path):
    script = (
        "import resource, sys\n"
        "from subspan.cli import main\n"
        "sys.argv = ['subspan', 'plan', '--model', 'llama-70b', '--method', 'all', '--quiet']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    # Time of the processor: other programs may run.
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 10 and kilobytes < 1e6


@pytest.mark.slow
def test_the_page_of_headlines_is_up_to_date():
    command = [sys.executable, "-m", "benchmarks.headlines", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
