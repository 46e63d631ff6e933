"""The race itself: every arm's course, the pool that runs its steps, results.json after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from subspan.train import runfolder
from subspan.train.checkpoints import last_complete, step_of
from subspan.train.distributed import world_size
from subspan.train.errors import JobError
from subspan.train.files import write_text
from subspan.train.metrics import read_metrics
from subspan.train.race.board import Board, measures
from subspan.train.race.clock import measure
from subspan.train.race.config import CompareConfig
from subspan.train.race.course import Course, Step
from subspan.train.race.execute import Pool, pool
from subspan.train.race.plan import Race, Run, plan_race
from subspan.train.race.process import Task
from subspan.train.race.results import RESULTS, Results, read_results, write_results
from subspan.train.yamlfile import dump_yaml

ERRORS = "errors.txt"

_POLL_SECONDS = 0.3
_WRITE_SECONDS = 2.0


class Watcher:
    """What a comparison tells about its progress; the base class shows nothing."""

    def run_started(self, run: Run, until: int | None) -> None:
        """A run starts or goes on, up to a step or its end."""

    def run_metrics(self, run: Run, lines: Sequence[dict[str, Any]]) -> None:
        """All metrics lines of a running run so far; called a few times each second."""

    def run_ended(self, run: Run, until: int | None, reason: str | None) -> None:
        """A run did its step, had done it before, or failed for a reason."""

    def run_pruned(self, run: Run, reason: str) -> None:
        """A trial does not go on."""

    def clock_started(self, rounds: int) -> None:
        """The arms are being timed."""

    def clock_failed(self, reason: str) -> None:
        """They could not be timed."""


def compare(
    config: CompareConfig,
    methods: Sequence[str] | None = None,
    watcher: Watcher | None = None,
) -> Results:
    """Run a comparison, or what an earlier start left to do, and write results.json.

    Args:
        config: the comparison.
        methods: see `plan_race`.
        watcher: told about the progress.

    Returns:
        The content of results.json. Runs that failed are rows with a reason.

    Raises:
        JobError: bad configuration, or a folder that holds another comparison. Nothing has run.
    """
    if world_size() > 1:
        raise JobError("a comparison starts one process per run itself; run it without torchrun")
    race = plan_race(config, methods)
    watcher = watcher or Watcher()
    previous = read_results(race.folder) if (race.folder / RESULTS).exists() else None
    with runfolder.locked(race.folder):
        write_text(race.folder / "config.yaml", dump_yaml(config.model_dump(mode="json")))
        board = Board(race, previous)
        with pool(race) as opened:
            driver = Driver(race, board, opened, watcher)
            try:
                driver.drive()
                _time(race, board, driver.courses, opened, watcher)
            finally:
                board.running.clear()
                driver.write()
    return board.results(driver.courses)


def _time(
    race: Race, board: Board, courses: Sequence[Course], opened: Pool[Any], watcher: Watcher
) -> None:
    """The measurement of the clock, unless an earlier start made it."""
    config = race.config.clock
    runs = {c.arm.name: next((r for r in c.runs if r.trial == c.chosen), None) for c in courses}
    done = {name: run for name, run in runs.items() if run is not None and board.result(run)}
    if config is None or not done:
        board.clock = None
        return
    before = board.clock
    if before is not None and before["rounds"] >= config.rounds and list(before["arms"]) == [*done]:
        return
    watcher.clock_started(config.rounds)
    needed = sum(measures(board.result(run) or {})["peak_memory_bytes"] for run in done.values())
    arms = {name: run.config for name, run in done.items()}
    try:
        board.clock = measure(
            arms, config.rounds, config.processes, round(needed), race.folder, opened
        )
    except JobError as error:
        watcher.clock_failed(str(error))


class Driver:
    """Gives the steps of all courses to a pool, those of earlier arms first."""

    def __init__(self, race: Race, board: Board, opened: Pool[Step], watcher: Watcher) -> None:
        self._race, self._board, self._pool, self._watcher = race, board, opened, watcher
        self.courses = [Course(race, arm, board.diverged) for arm in race.arms.values()]
        self._waves: list[Iterator[list[Step]]] = [course.waves() for course in self.courses]
        self._waiting: list[list[Step]] = [[] for _ in self.courses]
        self._open: list[set[Step]] = [set() for _ in self.courses]
        self._running: dict[Step, int] = {}
        self._written = (0.0, None)

    def drive(self) -> None:
        """Until all courses have ended."""
        for number in range(len(self.courses)):
            self._next_wave(number)
        self.write()
        while self._running or any(self._waiting):
            self._fill()
            for step, reason in self._pool.wait(_POLL_SECONDS):
                self._ended(step, reason)
            for step in self._running:
                lines = read_metrics(step.run.path / runfolder.METRICS)
                self._watcher.run_metrics(step.run, lines)
            self.write(_WRITE_SECONDS)

    def _next_wave(self, number: int) -> None:
        """Ask a course for steps until there are some to do, or it has ended."""
        course = self.courses[number]
        while not self._open[number]:
            pruned = set(course.stopped)
            wave = next(self._waves[number], None)
            for run in course.runs:
                if run.folder in course.stopped.keys() - pruned:
                    self._watcher.run_pruned(run, course.stopped[run.folder].reason)
            if wave is None:
                return
            for step in wave:
                if self._is_done(step):
                    self._watcher.run_ended(step.run, step.until, None)
                elif self._board.diverged(step.run):
                    reason = self._board.failures[step.run.folder]
                    self._watcher.run_ended(step.run, step.until, reason)
                else:
                    self._waiting[number].append(step)
                    self._open[number].add(step)

    def _is_done(self, step: Step) -> bool:
        if self._board.result(step.run) is not None:
            return True
        last = last_complete(step.run.path / runfolder.CHECKPOINTS)
        return step.until is not None and last is not None and (step_of(last) or 0) >= step.until

    def _fill(self) -> None:
        for number, waiting in enumerate(self._waiting):
            while waiting and self._pool.room():
                self._start(number, waiting.pop(0))

    def _start(self, number: int, step: Step) -> None:
        run = step.run
        self._running[step] = number
        self._board.failures.pop(run.folder, None)
        self._watcher.run_started(run, step.until)
        try:
            runfolder.check_output(run.path, run.config)
        except JobError as error:
            self._ended(step, str(error))
            return
        self._board.running.add(run.folder)
        errors = f"{run.config.output}-{ERRORS}"
        task = Task(run.config.model_dump(mode="json"), step.until, errors)
        self._pool.start(step, task)

    def _ended(self, step: Step, reason: str | None) -> None:
        number = self._running.pop(step)
        self._board.running.discard(step.run.folder)
        # What is complete on disk counts, also when the process then failed to end well.
        if self._is_done(step):
            reason = None
        elif reason is None:
            reason = "ended without a result"
        if reason is not None:
            self._board.failures[step.run.folder] = reason
        self._watcher.run_ended(step.run, step.until, reason)
        self._open[number].discard(step)
        self._next_wave(number)
        self.write()

    def write(self, seconds: float = 0.0) -> None:
        """Write results.json if it has changed, unless that was done `seconds` ago."""
        if time.monotonic() - self._written[0] < seconds:
            return
        results: Any = self._board.results(self.courses)
        if results != self._written[1]:
            write_results(self._race.folder, results)
        self._written = (time.monotonic(), results)
