"""The same race through Ray: a local cluster of two workers, one of which is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from subspan.train.errors import JobError
from subspan.train.race import execute
from subspan.train.race.config import CompareConfig
from subspan.train.race.execute import RayPool
from subspan.train.race.plan import Run
from subspan.train.race.process import Task
from subspan.train.race.race import Watcher, compare

Build = Callable[..., CompareConfig]


def workers() -> list[int]:
    """Ray workers that run a task."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().startswith(b"ray::_on_machine"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


class Killer(Watcher):
    """Kills one worker, once there are two and a run shows progress."""

    def __init__(self) -> None:
        self.together = 0
        self.killed: int | None = None

    def run_metrics(self, run: Run, lines: Sequence[dict[str, Any]]) -> None:
        found = workers()
        self.together = max(self.together, len(found))
        if self.killed is None and len(found) > 1 and lines:
            self.killed = found[0]
            os.kill(found[0], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ray_gives_the_table_of_a_local_race_also_after_a_killed_worker(
    comparison: Build, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    common: dict[str, Any] = {"arms": {"galore": {"rank": 4}}, "seeds": [0, 1], "workers": 2}
    local = compare(comparison(**common, output=str(tmp_path / "local")))
    config = comparison(**common, output=str(tmp_path / "ray"), ray="local")
    killer = Killer()
    first = compare(config, None, killer)
    assert killer.together == 2
    failed = [row for row in first["runs"] if row["state"] == "failed"]
    assert len(failed) == 1
    assert str(failed[0]["reason"]).startswith("lost with its Ray worker")
    assert [row["state"] for row in first["runs"]].count("finished") == 1
    second = compare(config)
    assert second["runs"] == local["runs"]
    losses = [each["arms"]["galore"]["mean"] for each in (local, second)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0]["validation_loss"] == losses[1]["validation_loss"]


def test_missing_ray_and_unreachable_clusters_are_one_line(
    comparison: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = comparison().arm("adamw")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(JobError, match=r"needs the package ray; pip install 'subspan\[ray\]'"):
        RayPool("local", 1, tmp_path, config)


def test_unreachable_cluster_is_one_line(comparison: Build, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = comparison().arm("adamw")
    with pytest.raises(JobError, match="ray='not a host'") as error:
        RayPool("not a host", 1, tmp_path, config)
    assert "\n" not in str(error.value)


def test_machine_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    reason = execute._on_machine(Task({}, None, "e"), str(tmp_path / "elsewhere"))
    assert reason is not None
    assert "does not see" in reason
    assert "file system that all machines share" in reason
