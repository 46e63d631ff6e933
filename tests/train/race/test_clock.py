"""The clock: arms in turn, medians, processes where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.files import write_json
from subspan.train.race import clock
from subspan.train.race.process import Task

Settings = Callable[..., TrainConfig]


def test_summary_is_medians_and_quartiles() -> None:
    steps: Any = [[5.0, 1.0], [1.0, 2.0], [2.0, 9.0], [3.0, 3.0], [4.0, 4.0]]
    attached: Any = [[1.0, None], [1.0, None]]
    row = clock.summary({"a": steps, "b": attached}, 5, {"cores": 2})
    assert row["arms"]["a"] == {
        "step_seconds": 3.0,
        "low": 2.0,
        "high": 4.0,
        "mean_seconds": 3.0,
        "optimizer_seconds": 3.0,
    }
    assert row["arms"]["b"]["optimizer_seconds"] is None
    assert (row["rounds"], row["machine"]) == (5, {"cores": 2})


def test_arms_take_turns_and_another_one_begins_each_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Settings
) -> None:
    order: list[tuple[str, int]] = []

    class Stepper:
        def __init__(self, config: TrainConfig, folder: Path) -> None:
            self.name = config.method

        def step(self, number: int) -> tuple[float, float | None]:
            order.append((self.name, number))
            return float(number), None

    monkeypatch.setattr(clock, "Stepper", Stepper)
    arms = {name: settings(method=name, rank=None) for name in ("galore", "fira", "apollo")}
    times = clock.take_turns(arms, 3, tmp_path)
    assert times == {name: [(2.0, None), (3.0, None), (4.0, None)] for name in arms}
    assert [order[3 * number][0] for number in range(4)] == ["galore", "fira", "apollo", "galore"]
    assert [number for _, number in order] == sorted(number for _, number in order)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulation": 2},
        {"update_in_backward": True, "clip": 0.0},
        {"dtype": "bfloat16-mixed"},
        {"int8_weights": True},
    ],
)
def test_step_is_timed_for_every_kind_of_run(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    times = clock.take_turns({"a": settings(**changes)}, 3, tmp_path)["a"]
    assert len(times) == 3
    for whole, own in times:
        assert whole > 0
        if changes.get("update_in_backward"):
            assert own is None
        else:
            assert own is not None
            assert 0 < own < whole


class TimingPool:
    """Writes invented times; fails with `reason` when more than one arm is asked for."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.asked: list[tuple[list[str], int]] = []
        self._ended: list[tuple[str, str | None]] = []

    def room(self) -> bool:
        return True

    def start(self, key: str, task: Task) -> None:
        arms, rounds = list(task.config["arms"]), task.config["rounds"]
        self.asked.append((arms, rounds))
        failed = self.reason if len(arms) > 1 else None
        if failed is None:
            times = {name: [(1.0, 0.1)] * rounds for name in arms}
            write_json(Path(task.config["results"]), {"times": times, "machine": {}})
        self._ended = [(key, failed)]

    def wait(self, seconds: float) -> list[tuple[str, str | None]]:
        return self._ended

    def close(self) -> None:
        pass


def measured(
    pool: TimingPool, folder: Path, settings: Settings, processes: str = "auto", needed: int = 0
) -> Any:
    arms = {"a": settings(), "b": settings()}
    return clock.measure(arms, 7, processes, needed, folder, pool)


def test_one_process_where_memory_allows_it(settings: Settings, tmp_path: Path) -> None:
    pool = TimingPool()
    row = measured(pool, tmp_path, settings)
    assert pool.asked == [(["a", "b"], 7)]
    assert row["rounds"] == 7
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("needed", [0, 1 << 60])
def test_processes_in_turn_where_memory_is_short(
    settings: Settings, tmp_path: Path, needed: int
) -> None:
    pool = TimingPool("killed by signal SIGKILL, probably for want of memory")
    row = measured(pool, tmp_path, settings, needed=needed)
    turns = [(["a"], 3), (["b"], 3)] * 3
    assert pool.asked == ([] if needed else [(["a", "b"], 7)]) + turns
    assert row["rounds"] == 9
    assert list(row["arms"]) == ["a", "b"]


def test_other_failures_are_reported(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the arms could not be timed: bad luck"):
        measured(TimingPool("bad luck"), tmp_path, settings)
    with pytest.raises(JobError, match="out of memory"):
        measured(TimingPool("out of memory: x"), tmp_path, settings, processes="one")
