"""Where the processes of a race run: a pool on this machine, or a Ray cluster."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from subspan.train.config import TrainConfig
from subspan.train.errors import JobError, one_line
from subspan.train.race import process
from subspan.train.race.plan import Race
from subspan.train.race.process import Child, Task

K = TypeVar("K")
Ended = list[tuple[K, str | None]]
"""Keys of tasks that ended, each with the reason why it failed."""


class Pool(Protocol[K]):
    """Starts tasks and says when they ended."""

    def room(self) -> bool:
        """Whether one more task may be given."""

    def start(self, key: K, task: Task) -> None:
        """Give a task, known by `key` from now on."""

    def wait(self, seconds: float) -> Ended[K]:
        """Tasks that ended, after at most `seconds`."""

    def close(self) -> None:
        """End what still runs."""


class LocalPool(Generic[K]):
    """`workers` processes at once on this machine; on GPUs, each has one of them to itself while
    there are enough."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._running: dict[K, tuple[Child, int]] = {}
        self._gpus = _gpus()

    def room(self) -> bool:
        return len(self._running) < self._workers

    def start(self, key: K, task: Task) -> None:
        slot = min(set(range(self._workers)) - {slot for _, slot in self._running.values()})
        own = self._gpus[slot % len(self._gpus)] if self._gpus else None
        child = Child(task, {} if own is None else {"CUDA_VISIBLE_DEVICES": own})
        self._running[key] = (child, slot)

    def wait(self, seconds: float) -> Ended[K]:
        deadline = time.monotonic() + seconds
        while self._running:
            ended = [key for key, (child, _) in self._running.items() if child.wait(0)]
            if ended or time.monotonic() >= deadline:
                return [(key, self._running.pop(key)[0].reason()) for key in ended]
            # The wait of one child ends early when that child does.
            next(iter(self._running.values()))[0].wait(min(0.05, seconds))
        return []

    def close(self) -> None:
        for child, _ in self._running.values():
            child.end()
        self._running.clear()


def _gpus() -> list[str]:
    """Names of the GPUs that processes share; none when there is at most one."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        found = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    else:
        found = [str(i) for i in range(torch.cuda.device_count())]
    return found if len(found) > 1 else []


class RayPool(Generic[K]):
    """Every task is a Ray task, which starts the same process as a local pool would.

    All machines must see the folder of the comparison under the same path and have subspan
    installed. Ray does not repeat tasks: a run whose worker died is a row of the table, and the
    same command goes on with it.

    Args:
        address: of a running cluster, `auto`, or `local` to start one on this machine.
        workers: with `local`, how many runs at once.
        folder: of the comparison, which must be visible to all machines.
        config: of a run; its threads are the cores that a task asks for.
    """

    def __init__(self, address: str, workers: int, folder: Path, config: TrainConfig) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise JobError("ray needs the package ray; pip install 'subspan[ray]'") from None
        self._ray = ray
        self._tasks: dict[Any, K] = {}
        cores = config.threads or 1
        local: dict[str, Any] = {"num_cpus": workers * cores, "include_dashboard": False}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(local if address == "local" else {}),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise JobError(f"ray={address!r}: {one_line(error)}") from None
        gpu = config.device != "cpu" and "GPU" in ray.cluster_resources()
        remote = ray.remote(num_cpus=cores, num_gpus=1 if gpu else 0, max_retries=0)
        self._run: Any = remote(_on_machine)
        self._folder = str(folder.resolve())

    def room(self) -> bool:
        return True

    def start(self, key: K, task: Task) -> None:
        self._tasks[self._run.remote(task, self._folder)] = key

    def wait(self, seconds: float) -> Ended[K]:
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        return [(self._tasks.pop(task), self._reason(task)) for task in done]

    def _reason(self, task: Any) -> str | None:
        try:
            reason: str | None = self._ray.get(task)
        except self._ray.exceptions.OutOfMemoryError:
            return f"{process.MEMORY}: ended by Ray's memory monitor"
        except self._ray.exceptions.RayError as error:
            return f"lost with its Ray worker: {one_line(error).split('. ')[0]}"
        return reason

    def close(self) -> None:
        # Workers die with the driver's job, and their runs with them.
        self._ray.shutdown()


def _on_machine(task: Task, folder: str) -> str | None:
    for needed in (folder, task.directory):
        if not Path(needed).is_dir():
            return (
                f"machine {platform.node()} does not see {needed}; Ray runs need a file system "
                "that all machines share"
            )
    return process.run(task)


@contextmanager
def pool(race: Race) -> Iterator[Pool[Any]]:
    """The pool that the configuration asks for; what still runs is ended at the exit.

    Raises:
        JobError: Ray is missing or cannot be reached.
    """
    config = race.config
    opened: Pool[Any]
    if config.ray is None:
        opened = LocalPool(config.workers)
    else:
        base = next(iter(race.arms.values())).base
        opened = RayPool(config.ray, config.workers, race.folder, base)
    try:
        yield opened
    finally:
        opened.close()
