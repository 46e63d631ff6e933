"""SIGKILL at any moment: whoever is killed, the same command ends with the same table."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspan.train.metrics import read_metrics
from subspan.train.race.config import CompareConfig
from subspan.train.race.results import read_results
from subspan.train.yamlfile import dump_yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]

TIMED = ("seconds", "tokens_per_second", "peak_memory_bytes")
SCRIPT = """
import sys
from pathlib import Path
from subspan.train.race.config import compare_config
from subspan.train.race.race import compare
compare(compare_config(Path(sys.argv[1]), {}))
"""


def start(file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)])


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            child = int(stat.parent.name)
            found += [child, *descendants(child)]
    return found


def comparable(folder: Path) -> Any:
    """results.json without what was measured by a clock."""
    results: Any = read_results(folder)
    for arm in results["arms"].values():
        for part in ("mean", "spread"):
            for name in TIMED if arm[part] else ():
                del arm[part][name]
    return results


def curves(folder: Path) -> dict[str, Any]:
    names = ("step", "loss", "validation_loss", "grad_norm")
    return {
        str(file.relative_to(folder)): [
            {name: line[name] for name in names if name in line} for line in read_metrics(file)
        ]
        for file in sorted(folder.rglob("metrics.jsonl"))
    }


@pytest.mark.parametrize("seed", [0])
def test_race_killed_at_random_moments_ends_with_identical_numbers(
    comparison: Callable[..., CompareConfig], tmp_path: Path, seed: int
) -> None:
    def file(name: str) -> Path:
        config = comparison(
            output=str(tmp_path / name),
            arms={"galore": {"rank": 4}},
            search={"fields": {"lr": [0.001, 0.01]}},
            halving={"rungs": [0.5], "keep": 0.5},
            seeds=[0, 1],
            workers=2,
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_yaml(config.model_dump(mode="json")))
        return path

    assert start(file("whole")).wait() == 0
    source, cut = random.Random(seed), file("cut")
    for victim in ("child", "parent"):
        process = start(cut)
        deadline = time.monotonic() + 120
        while not descendants(process.pid) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(source.uniform(0, 8))
        children = descendants(process.pid)
        target = source.choice(children or [process.pid]) if victim == "child" else process.pid
        if process.poll() is None:
            os.kill(target, signal.SIGKILL)
        if victim == "child":
            assert process.wait() == (0 if children else -signal.SIGKILL)
            continue
        process.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert start(cut).wait() == 0
    whole, other = tmp_path / "whole", tmp_path / "cut"
    assert comparable(other) == comparable(whole)
    best = read_results(whole)["arms"]["galore"]["chosen"]
    for number in (0, 1):
        run = f"galore/{best}/seed-{number}"
        ends = [json.loads((f / run / "result.json").read_text()) for f in (whole, other)]
        assert ends[0]["validation_loss"] == ends[1]["validation_loss"]
        saved = [load_file(f / run / "final" / "model.safetensors") for f in (whole, other)]
        assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
        name = f"{run}/metrics.jsonl"
        assert curves(whole)[name] == curves(other)[name]
