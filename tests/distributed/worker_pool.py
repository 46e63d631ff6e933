"""Processes that stay for a whole test session and run functions together.

A test names a function that the processes can import and the number of ranks; each of them calls it
with its mesh and sends back what it returns, or its traceback. Nothing can wait for ever: a call
that does not come back in time fails the test and takes its processes with it, and processes whose
parent dies end themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Seconds. What a rank still has after another one has failed; the others may wait for it.
GRACE = 5.0
TIMEOUT = 120.0


class Failed(AssertionError):
    """A call failed on some rank, or did not end."""


class Pool:
    """Processes that are started with the first call.

    Args:
        size: their number, and the largest number of ranks.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._groups, self._joined = 0, 0

    @property
    def pids(self) -> list[int | None]:
        """Process numbers; none before the first call, or after a failure."""
        return [process.pid for process in self._processes]

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ranks: int,
        connected: bool = True,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """What `function(mesh, *arguments)` returns on each of the first `ranks` processes.

        Args:
            function: importable by name.
            arguments: of which the processes get copies.
            ranks: how many take part.
            connected: make them a process group (gloo) and give the function its one-dimensional
                mesh; else the function gets the arguments alone.
            timeout: seconds after which the call has failed.

        Raises:
            Failed: with the tracebacks of all ranks that failed, or the ranks that did not answer.
        """
        self._start()
        if connected and self._joined != ranks:
            self._groups, self._joined = self._groups + 1, ranks
        group = (Path(self._folder.name, f"group-{self._groups}"), ranks) if connected else None
        for pipe in self._pipes[:ranks]:
            pipe.send((function, arguments, group))
        name, answers, errors = getattr(function, "__name__", "?"), {}, {}
        deadline = time.monotonic() + timeout
        while len(answers) + len(errors) < ranks:
            pending = {
                pipe: rank
                for rank, pipe in enumerate(self._pipes[:ranks])
                if rank not in answers and rank not in errors
            }
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process ended"
                (answers if ok else errors)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                self.close()
                told = "".join(f"\nrank {rank}:\n{text}" for rank, text in errors.items())
                silent = ", ".join(map(str, sorted(pending.values())))
                raise Failed(
                    f"{name} on {ranks} ranks: no answer from rank {silent} "
                    + (f"after a failure{told}" if errors else f"within {timeout:g} s: a hang")
                )
        if errors:
            if any("the process ended" in text for text in errors.values()):
                self.close()
            told = "".join(f"\nrank {rank}:\n{text}" for rank, text in sorted(errors.items()))
            raise Failed(f"{name} failed on {len(errors)} of {ranks} ranks{told}")
        return [answers[rank] for rank in range(ranks)]

    def _start(self) -> None:
        if self._processes:
            return
        spawning = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes, whatever they are doing; the next call starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._joined = [], [], 0


def _serve(rank: int, pipe: Connection) -> None:
    """Call what comes through the pipe until it closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    joined = None
    while True:
        try:
            function, arguments, group = pipe.recv()
        except EOFError:
            return
        try:
            if group is not None:
                if group != joined:
                    _join(rank, *group)
                    joined = group
                arguments = (_mesh(), *arguments)
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _join(rank: int, store: Path, ranks: int) -> None:
    """Leave the process group that there was, and make another one."""
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    torch.set_num_threads(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)


def _mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))
