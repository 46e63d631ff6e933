"""Processes: they end with whoever started them, and say in one line why they failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subspan.train.errors import JobError
from subspan.train.race import execute, process
from subspan.train.race.execute import LocalPool
from subspan.train.race.process import Child, Task, explain, failure

SLEEPER = """
import os, sys, time
from pathlib import Path
from subspan.train.race.process import explained, read_order

order = read_order()["config"]
Path(order["pid"]).write_text(str(os.getpid()))
with explained():
    if order.get("fail"):
        raise {"memory": MemoryError, "nan": FloatingPointError}[order["fail"]]("so it is")
    time.sleep(order["seconds"])
print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=sys.stderr)
sys.exit(order.get("status", 0))
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Task]:
    """Builds a task that sleeps; keywords are its order."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def build(name: str = "a", **order: Any) -> Task:
        config = {"pid": str(tmp_path / f"{name}.pid"), "seconds": 0} | order
        return Task(config, None, str(tmp_path / f"{name}-errors.txt"), module="sleeper")

    return build


def pid_of(task: Task) -> int:
    file = Path(task.config["pid"])
    deadline = time.monotonic() + 30
    while not file.is_file() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_process_ends_with_a_parent_that_is_killed(task: Callable[..., Task]) -> None:
    order = task(seconds=60)
    parent = f"""
        import sys
        sys.path.insert(0, {str(Path(process.__file__).parents[3])!r})
        from subspan.train.race.process import Task, run
        run(Task({order.config!r}, None, {order.errors!r}, module="sleeper"))
    """
    started = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)])
    child = pid_of(order)
    assert alive(child)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ended_process_has_a_reason_or_none(task: Callable[..., Task]) -> None:
    good, bad = task("good"), task("bad", status=3)
    assert process.run(good) is None
    assert not Path(good.errors).exists()
    assert process.run(bad) == "None"  # its last words
    assert Path(bad.errors).exists()
    assert process.run(task("m", fail="memory")) == "out of memory: so it is"
    assert process.run(task("n", fail="nan")) == "training diverged: so it is"
    child = Child(task("long", seconds=60))
    assert not child.wait(0)
    pid_of(child.task)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(10)
    assert child.reason() == "killed by signal SIGKILL, probably for want of memory"


def test_reasons_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "e"
    assert failure(-9, "", file) == "killed by signal SIGKILL, probably for want of memory"
    assert failure(2, "error: no text", file) == "no text"
    long = failure(1, "Traceback\n  line\nValueError: bad", file)
    assert long == f"ValueError: bad (all of it in {file})"
    assert explain(JobError("so")) == "so"
    assert explain(ValueError("bug")) is None
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert (explain(error.value) or "").startswith("out of memory: ")


def test_pool_runs_as_many_as_it_may_and_ends_them_when_it_closes(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool: LocalPool[str] = LocalPool(2)
    pool.start("a", task("a", seconds=60))
    assert pool.room()
    pool.start("b", task("b", status=1))
    assert not pool.room()
    ended: list[Any] = []
    deadline = time.monotonic() + 30
    while not ended:
        assert time.monotonic() < deadline
        ended = pool.wait(0.2)
    assert ended == [("b", "None")]
    assert pool.room()
    pid = pid_of(task("a"))
    pool.close()
    assert not alive(pid)
    assert pool.wait(0.1) == []


def test_workers_have_gpus_of_their_own(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    given = []

    def child(task: Task, environment: dict[str, str]) -> Any:
        given.append(environment["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(wait=lambda _: given.count("4") == 2, reason=lambda: None)

    monkeypatch.setattr(execute, "Child", child)
    pool: LocalPool[str] = LocalPool(3)
    for key in "abc":
        pool.start(key, task())
    assert given == ["4", "7", "4"]
    assert [key for key, _ in pool.wait(0)] == ["a", "b", "c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert execute._gpus() == []
