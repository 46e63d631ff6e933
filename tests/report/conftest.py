"""Run folders with invented numbers: a report needs no training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspan.train.config import CompareConfig
from subspan.train.runfolder import write_config

STEPS = 100


def result(method: str, loss: float, state: dict[str, int], seconds: float) -> dict[str, Any]:
    return {
        "method": method,
        "steps": STEPS,
        "tokens": STEPS * 1024,
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "training_loss": loss - 0.1,
        "seconds": seconds,
        "optimizer_seconds": seconds * 0.05,
        "tokens_per_second": STEPS * 1024 / seconds,
        "state_bytes": state | {"total": sum(state.values())},
        "inputs": {"corpus_hash": "c", "initial_weights_hash": "w", "parameters": 5_260_000},
        "versions": {"subspan": "0", "torch": "2"},
        "machine": {"system": "Linux", "cores": 2, "threads": 2, "gpu": None},
        "peak_memory_bytes": {"process": 700_000_000},
    }


def write_run(folder: Path, config: CompareConfig, done: dict[str, Any] | None) -> None:
    write_config(folder, config.arm(folder.name))
    final = done["validation_loss"] if done else 5.0
    lines = []
    for step in range(5, STEPS + 1, 5):
        base = {"step": step, "tokens": step * 1024, "seconds": step * 0.1}
        loss = final + math.exp(-step / 20)
        lines.append(base | {"loss": loss, "lr": 0.01, "grad_norm": 1.0})
        if step % 20 == 0:
            lines.append(base | {"validation_loss": loss, "perplexity": math.exp(loss)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "result.json").write_text(json.dumps(done))


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a comparison with two finished arms and a failed one."""

    def build(title: str = "Two <methods> & a failure", **changes: Any) -> Path:
        folder = tmp_path / "comparison"
        config = CompareConfig(output=str(folder), arms={"galore": {"lr": 0.02, "rank": 8}})
        done = {
            "adamw": result(
                "adamw", 5.3, {"first_moment": 21_000_000, "second_moment": 21_000_000}, 10
            ),
            "galore": result(
                "galore",
                5.4,
                {"first_moment": 9_000_000, "second_moment": 9_000_000, "basis": 900_000},
                11,
            ),
        }
        done["galore"]["inputs"] |= changes
        for name, values in done.items():
            write_run(folder / name, config, values)
        arms = done | {"fira": {"failed": "out of <luck>"}}
        (folder / "results.json").write_text(json.dumps({"title": title, "arms": arms}))
        return folder

    return build
