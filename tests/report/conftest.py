"""Run folders with invented numbers: a report needs no training."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subspan.train.config import TrainConfig, parse
from subspan.train.race.results import MEASURES
from subspan.train.runfolder import write_config

STEPS = 100
KINDS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def result(method: str, loss: float, state: Mapping[str, int], seconds: float) -> dict[str, Any]:
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
        "state_bytes": {**state, "total": sum(state.values())},
        "planned_bytes": {
            "weights": 21_000_000,
            "gradients": 21_000_000,
            **state,
            "total": 42_000_000 + sum(state.values()),
        },
        "inputs": {"corpus_hash": "c", "initial_weights_hash": "w", "parameters": 5_260_000},
        "versions": {"subspan": "0", "torch": "2"},
        "machine": {"system": "Linux", "cores": 2, "threads": 2, "gpu": None},
        "peak_memory_bytes": {"process": 700_000_000},
    }


def metrics(final: float, steps: int, log: int, evaluate: int, seed: int = 0) -> list[Any]:
    """Lines of a run whose loss falls towards `final`."""
    noise = random.Random(seed)
    lines = []
    for step in range(log, steps + 1, log):
        base = {"step": step, "tokens": step * 1024, "seconds": round(step * 0.1, 4)}
        loss = final + 4 * math.exp(-5 * step / steps)
        lines.append(base | {"loss": loss + noise.gauss(0, 0.05), "lr": 0.01, "grad_norm": 1.0})
        if step % evaluate == 0:
            lines.append(base | {"validation_loss": loss, "perplexity": math.exp(loss)})
    return lines


def subspaces(steps: int, gap: int, layers: int, rank: int = 8, seed: int = 0) -> list[Any]:
    """Recorder lines of a model of `layers` blocks."""
    noise = random.Random(seed)
    lines = []
    for step in range(1, steps + 1, gap):
        for layer in range(layers):
            for number, kind in enumerate(KINDS):
                depth = layer / max(1, layers - 1)
                energy = 0.95 - 0.3 * depth - 0.04 * number + 0.02 * noise.random()
                overlap = 1 - math.exp(-1.5 * step / steps) * (0.3 + 0.4 * depth)
                line = {"step": step, "name": f"model.layers.{layer}.{kind}.weight"}
                line |= {"shape": [64, 64], "rank": rank, "energy": round(energy, 6)}
                line["overlap"] = None if step == 1 else round(overlap - 0.03 * noise.random(), 6)
                line["effective_rank"] = round(rank * (0.4 + 0.5 * depth + 0.1 * noise.random()), 6)
                lines.append(line)
    return lines


def write_lines(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(
    folder: Path,
    values: Mapping[str, Any],
    done: dict[str, Any] | None,
    lines: list[Any] | None = None,
    recorded: list[Any] | None = None,
) -> Path:
    """A run folder as `subspan train` leaves it; without `done` it is not finished."""
    config = parse(TrainConfig, {"output": str(folder), **values}, "test")
    write_config(folder, config)
    final = done["validation_loss"] if done else 5.0
    write_lines(folder / "metrics.jsonl", lines or metrics(final, STEPS, 5, 20))
    if done:
        (folder / "result.json").write_text(json.dumps(done))
    if recorded:
        write_lines(folder / "subspaces.jsonl", recorded)
    return folder


def arm_row(method: str, done: list[dict[str, Any]], failed: str | None = None) -> dict[str, Any]:
    own = ("state_bytes", "peak_memory_bytes")
    table = {name: [float(each[name]) for each in done] for name in MEASURES if name not in own} | {
        "state_bytes": [float(each["state_bytes"]["total"]) for each in done],
        "peak_memory_bytes": [float(each["peak_memory_bytes"]["process"]) for each in done],
    }
    return {
        "method": method,
        "chosen": "lr-0.01",
        "settings": {"lr": 0.01},
        "seeds": len(done),
        "mean": {k: statistics.fmean(v) for k, v in table.items()} if done else None,
        "spread": {k: statistics.stdev(v) for k, v in table.items()} if len(done) > 1 else None,
        "failed": failed,
    }


def run_row(arm: str, folder: str, loss: float | None, **given: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "trial": "lr-0.01",
        "settings": {"lr": 0.01},
        "seed": 0,
        "role": "final",
        "folder": folder,
        "state": "finished",
        "steps": STEPS,
        "rung": None,
        "validation_loss": loss,
        "reason": None,
        **given,
    }


def write_results(folder: Path, title: str, **given: Any) -> Path:
    values = {
        "version": 2,
        "title": title,
        "same_inputs": True,
        "tokens": STEPS * 1024,
        "search": None,
        "seeds": [0],
        "clock": None,
        **given,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(values))
    return folder


STATES = {
    "adamw": {"first_moment": 21_000_000, "second_moment": 21_000_000},
    "galore": {"first_moment": 9_000_000, "second_moment": 9_000_000, "basis": 900_000},
}


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a comparison with two finished arms and a failed one."""

    def build(title: str = "Two <methods> & a failure", **changes: Any) -> Path:
        folder = tmp_path / "comparison"
        done = {
            "adamw": result("adamw", 5.3, STATES["adamw"], 10),
            "galore": result("galore", 5.4, STATES["galore"], 11),
        }
        done["galore"]["inputs"] |= changes
        for name, values in done.items():
            extra = {} if name == "adamw" else {"lr": 0.02, "rank": 8}
            write_run(folder / name, {"method": name, **extra}, values)
        arms = {name: arm_row(name, [values]) for name, values in done.items()}
        arms["fira"] = arm_row("fira", [], "out of <luck>") | {"seeds": 0}
        runs = [run_row(name, name, values["validation_loss"]) for name, values in done.items()]
        runs.append(run_row("fira", "fira", None, state="failed", steps=0, reason="out of <luck>"))
        return write_results(folder, title, arms=arms, runs=runs)

    return build


def write_search(folder: Path, arms: int = 3, seeds: int = 3, steps: int = 200) -> Path:
    """A comparison with a search of five learning rates and several seeds, and failures."""
    rates, rungs = (0.0025, 0.005, 0.01, 0.02, 0.04), [50, 100]
    methods = ("adamw", "galore", "fira", "apollo", "ldadam", "coap", "frugal", "muon")
    rows, table, clock = [], {}, {}
    for index, method in enumerate(methods[:arms]):
        best = 4.8 - 0.04 * index
        state = {"first_moment": 21_000_000 // (index + 1), "second_moment": 20_000_000}
        finals = []
        for number, rate in enumerate(rates):
            loss = best + 0.05 * abs(number - 2) ** 1.6
            trial, settings = f"lr-{rate:g}", {"lr": rate}
            place: dict[str, Any] = {"trial": trial, "settings": settings}
            for seed in range(seeds if number == 2 else 1):
                path = f"{method}/{trial}/seed-{seed}"
                own = loss + 0.012 * math.sin(7 * seed + index)
                role = "final" if number == 2 else "trial"
                row = run_row(method, path, own, **place, seed=seed, role=role, steps=steps)
                done = result(method, own, state, 20 + index + 0.3 * seed)
                done |= {"steps": steps, "tokens": steps * 1024}
                done["inputs"] = done["inputs"] | {"seed": seed, "initial_weights_hash": f"w{seed}"}
                if number == 4 and index != 1:
                    reason = "training diverged: loss is nan at step 60; lower lr or plain_lr"
                    row |= {"state": "failed", "steps": 60, "validation_loss": None}
                    row["reason"] = reason
                elif number == 0:
                    loss_there = own + 0.8
                    row |= {"state": "stopped", "steps": 50, "validation_loss": loss_there}
                    row["reason"] = f"pruned at rung 50: loss {loss_there:.2f}, best 5.20"
                elif role == "final":
                    recorded = subspaces(steps, 20, 4, seed=index) if index and not seed else None
                    lines = metrics(own, steps, 2, 20, seed=10 * index + seed)
                    values = {"method": method, **settings, "seed": seed, "steps": steps}
                    write_run(folder / path, values, done, lines, recorded)
                    finals.append(done)
                rows.append(row)
        table[method] = arm_row(method, finals)
        clock[method] = {
            "step_seconds": 0.1 + 0.01 * index,
            "low": 0.095 + 0.01 * index,
            "high": 0.108 + 0.012 * index,
            "mean_seconds": 0.1 + 0.01 * index,
            "optimizer_seconds": 0.01 + 0.008 * index,
        }
    search = {"sampler": "grid", "trials": 5, "rungs": rungs, "keep": 0.5, "seed": 0}
    return write_results(
        folder,
        "A search with seeds",
        arms=table,
        runs=rows,
        search=search,
        seeds=list(range(seeds)),
        tokens=steps * 1024,
        clock={"rounds": 20, "arms": clock, "machine": {}},
    )


@pytest.fixture
def make() -> SimpleNamespace:
    """The functions of this file."""
    return SimpleNamespace(
        metrics=metrics,
        result=result,
        run=write_run,
        search=write_search,
        states=STATES,
        steps=STEPS,
        subspaces=subspaces,
    )
