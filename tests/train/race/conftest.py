"""A pool that invents runs: it writes what a run leaves on disk, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from subspan.train import runfolder
from subspan.train.checkpoints import MANIFEST
from subspan.train.config import TrainConfig, parse
from subspan.train.files import write_json
from subspan.train.race import race as module
from subspan.train.race.config import CompareConfig
from subspan.train.race.course import Step
from subspan.train.race.plan import Race
from subspan.train.race.process import DIVERGED, Task

BEST = {"adamw": 1e-3, "galore": 1e-2}
DIVERGES = 1.0  # learning rate


def loss_of(config: TrainConfig, step: int) -> float:
    """A bowl in log(lr) around the method's best rate; it gets deeper with every step."""
    distance = math.log(config.lr / BEST[config.method]) ** 2
    return 3 + math.exp(-step / 10) + 0.05 * distance * step / 10 + 0.001 * config.seed


class InventedPool:
    """Runs one step at a time; `interrupt(count)` is called with the number of started steps."""

    def __init__(self) -> None:
        self.started: list[Step] = []
        self.interrupt: Callable[[int], str | None] = lambda count: None
        self._ended: list[tuple[Step, str | None]] = []

    def room(self) -> bool:
        return not self._ended

    def start(self, key: Step, task: Task) -> None:
        self.started.append(key)
        config = parse(TrainConfig, task.config, "task")
        reason = self.interrupt(len(self.started))
        if reason is None:
            reason = self._run(config, Path(config.output), task.until or config.total_steps)
        self._ended.append((key, reason))

    def wait(self, seconds: float) -> list[tuple[Step, str | None]]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        pass

    def _run(self, config: TrainConfig, folder: Path, until: int) -> str | None:
        runfolder.write_config(folder, config)
        lines = []
        for step in range(config.eval_steps, until + 1, config.eval_steps):
            if config.lr >= DIVERGES and step > config.total_steps // 2:
                return f"{DIVERGED}: loss is nan at step {step}"
            seen = {"step": step, "tokens": step * config.tokens_per_step, "seconds": step / 10}
            loss = loss_of(config, step)
            lines.append(seen | {"validation_loss": loss, "perplexity": math.exp(loss)})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        write_json(
            folder / "checkpoints" / f"checkpoint-{until}" / MANIFEST, {"files": {}, "step": until}
        )
        if until == config.total_steps:
            write_json(folder / "result.json", invented_result(config, lines[-1]))
        return None


def invented_result(config: TrainConfig, last: dict[str, Any]) -> dict[str, Any]:
    state = {"first_moment": 100, "total": 100 if config.method == "galore" else 400}
    return last | {
        "method": config.method,
        "steps": config.total_steps,
        "tokens_per_second": 1000.0 + config.seed,
        "state_bytes": state,
        "peak_memory_bytes": {"process": 5000},
        "inputs": {
            "corpus_hash": "c",
            "initial_weights_hash": f"w{config.seed}",
            "data_order_hash": f"o{config.seed}",
            "seed": config.seed,
            "parameters": 10,
            "vocabulary": 300,
        },
        "machine": {"gpu": None, "cores": 2, "threads": 1},
        "versions": {"torch": "2", "subspan": "0"},
    }


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> InventedPool:
    """Takes the place of every pool."""
    made = InventedPool()

    @contextmanager
    def pool(race: Race) -> Iterator[InventedPool]:
        yield made

    monkeypatch.setattr(module, "pool", pool)
    return made


@pytest.fixture
def comparison(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> Callable[..., CompareConfig]:
    """Builds a comparison of adamw and galore of 40 steps; keywords override."""

    def build(**changes: Any) -> CompareConfig:
        job = settings(
            rank=None, update_proj_gap=None, steps=40, eval_every=4, checkpoint_every=4
        ).model_dump(mode="json")
        for name in ("output", "method", "lr", "seed"):
            job.pop(name)
        base: dict[str, Any] = {
            "output": str(tmp_path / "out"),
            "title": "A race",
            "job": job,
            "arms": {"adamw": {"lr": 0.002}, "galore": {"rank": 4, "lr": 0.02}},
        }
        return parse(CompareConfig, base | changes, "test")

    return build


@pytest.fixture
def searching(comparison: Callable[..., CompareConfig]) -> Callable[..., CompareConfig]:
    """A comparison with four trials per arm, two rungs and two seeds; keywords override."""

    def build(**changes: Any) -> CompareConfig:
        grids = {
            "adamw": {"search": {"lr": [1e-4, 1e-3, 1e-2, 1.0]}},
            "galore": {"rank": 4, "search": {"lr": [1e-3, 1e-2, 1e-1, 2.0]}},
        }
        base: dict[str, Any] = {
            "arms": grids,
            "search": {},
            "halving": {"rungs": [0.2, 0.6], "keep": 0.5},
            "seeds": [0, 1],
        }
        return comparison(**(base | changes))

    return build
