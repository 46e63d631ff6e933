"""One run in a process of its own: starting it, and what became of it.

A process of its own makes peak memory each run's, and lets the race survive the failure of one.
The configuration goes through standard input, which then stays open: when it closes, whoever
started the run is gone, and the run ends too. This is noticed on any system, within milliseconds,
also after SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspan.train.errors import JobError, one_line

DIVERGED = "training diverged"
"""How the reason of a run begins that would fail again in the same way."""
MEMORY = "out of memory"

_FAILED = 2
_PATIENCE = 30.0  # seconds; an earlier process of the run that lost its parent ends in less


@dataclass(frozen=True)
class Task:
    """What a process is to do.

    Attributes:
        config: of the run, as plain values.
        until: step to stop after; none: the whole run.
        errors: file for what the process says of errors; removed when there are none.
        module: to start; it takes `config` and `until` from `read_order`.
        directory: to work in, to which the paths of the configuration are relative.
    """

    config: dict[str, Any]
    until: int | None
    errors: str
    module: str = "subspan.train.race.process"
    directory: str = field(default_factory=os.getcwd)


class Child:
    """A running process.

    Args:
        task: what it does.
        environment: variables added to this process's.
    """

    def __init__(self, task: Task, environment: Mapping[str, str] | None = None) -> None:
        self.task = task
        self._errors = Path(task.directory, task.errors)
        self._errors.parent.mkdir(parents=True, exist_ok=True)
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", task.module],
                cwd=task.directory,
                env=_environment(environment or {}),
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                # Ctrl-C is the parent's to handle.
                start_new_session=True,
            )
        order = json.dumps({"config": task.config, "until": task.until}) + "\n"
        stdin: Any = self._process.stdin
        with suppress(BrokenPipeError):
            stdin.write(order.encode())
            stdin.flush()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the process has ended, after at most `seconds` (none: however long)."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def reason(self) -> str | None:
        """Why the ended process failed; none when it did not."""
        self._close()
        status = self._process.returncode
        text = self._errors.read_text(encoding="utf-8", errors="replace").strip()
        if status == 0:
            self._errors.unlink()
            return None
        return failure(status, text, self._errors)

    def end(self) -> None:
        """Make the process end, if it has not."""
        self._process.terminate()
        if not self.wait(5):
            self._process.kill()
            self.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def run(task: Task) -> str | None:
    """Do the task in a process; returns why it failed, or none."""
    child = Child(task)
    try:
        child.wait()
    finally:
        child.end()
    return child.reason()


def failure(status: int, text: str, errors: Path) -> str:
    """One line from an exit status and what was written to the file `errors`."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", probably for want of memory" if -status == signal.SIGKILL else ""
        return f"killed by signal {name}{hint}"
    lines = text.splitlines()
    message = lines[-1].removeprefix("error: ") if lines else "no message"
    return message if len(lines) <= 1 else f"{message} (all of it in {errors})"


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    # The child imports the same subspan, also when it is not installed.
    source = str(Path(__file__).resolve().parents[3])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Waiting threads sleep: spinning ones stall each other when other programs need the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | dict(added)
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def read_order() -> dict[str, Any]:
    """In the child: what to do. From now on the process ends with its parent."""
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(_FAILED)
    threading.Thread(target=_end_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    order: dict[str, Any] = json.loads(line)
    return order


def _end_with_parent(pipe: int) -> None:
    # Not through sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
    while os.read(pipe, 1):
        pass
    os._exit(_FAILED)


def explain(error: BaseException) -> str | None:
    """One line for an error that a run may end with; none for one that deserves a traceback."""
    text = one_line(error)
    if isinstance(error, JobError):
        return text
    if isinstance(error, FloatingPointError):
        return f"{DIVERGED}: {text}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in text:
        return f"{MEMORY}: {text.split('. ')[0]}"
    return None


@contextmanager
def explained() -> Iterator[None]:
    """In the child: end with one line where one line is enough."""
    try:
        yield
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(_FAILED)


def _wait_for(folder: Path) -> None:
    """Let an earlier process of the same run end, which may need a moment to see that it must."""
    from subspan.train import runfolder

    deadline = time.monotonic() + _PATIENCE
    while (folder / ".lock").is_file() and time.monotonic() < deadline:
        with suppress(JobError), runfolder.locked(folder):
            return
        time.sleep(0.2)


def main() -> None:
    """Train as standard input says."""
    from rich.console import Console

    order = read_order()
    with explained():
        from subspan.train.config import TrainConfig, parse
        from subspan.train.job import run_job

        config = parse(TrainConfig, order["config"], "run")
        _wait_for(Path(config.output))
        run_job(config, Console(quiet=True), order["until"])


if __name__ == "__main__":
    main()
