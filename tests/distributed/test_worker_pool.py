"""The pool itself: failures are told, hangs end, and processes do not outlive their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_pool import Failed, Pool


@pytest.fixture
def small() -> Iterator[Pool]:
    """Two processes that never load torch."""
    pool = Pool(2)
    yield pool
    pool.close()


def test_a_hang_fails_with_the_ranks_that_are_silent_and_the_next_call_works(small: Pool) -> None:
    with pytest.raises(Failed, match=r"no answer from rank 0, 1 within 0\.5 s"):
        small.run(time.sleep, 60, ranks=2, connected=False, timeout=0.5)
    assert small.run(abs, -3, ranks=2, connected=False) == [3, 3]


def test_errors_come_back_with_their_traceback(small: Pool) -> None:
    with pytest.raises(Failed, match=r"rank 0:(.|\n)*ZeroDivisionError(.|\n)*rank 1"):
        small.run(divmod, 1, 0, ranks=2, connected=False)
    assert small.run(abs, -3, ranks=2, connected=False) == [3, 3]


def test_a_process_that_dies_is_a_failure(small: Pool) -> None:
    with pytest.raises(Failed, match="the process ended"):
        small.run(os._exit, 1, ranks=2, connected=False)


def test_processes_end_with_their_parent() -> None:
    script = (
        "import os, time; from worker_pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(2); pool.run(abs, 1, ranks=2, connected=False)\n"
        "    print(*pool.pids, flush=True); os._exit(0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    pids, deadline = [int(word) for word in told.split()], time.monotonic() + 20
    assert len(pids) == 2
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
