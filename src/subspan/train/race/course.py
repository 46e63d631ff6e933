"""The course of one arm: its trials, who goes on from each rung, the final runs.

A course is decided by what the runs left on disk and by nothing else, so a race that is started
again takes the same decisions. Arms do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

from subspan.train import runfolder
from subspan.train.metrics import read_metrics
from subspan.train.race.halving import survivors
from subspan.train.race.plan import Arm, Race, Run
from subspan.train.race.trials import Drawn, draw

DRAWN = "trials.json"


@dataclass(frozen=True)
class Step:
    """A run up to a step, or (none) to its end."""

    run: Run
    until: int | None


@dataclass(frozen=True)
class Stop:
    """Where a trial was stopped: number of the rung, step, validation loss there, best loss."""

    rung: int
    step: int
    loss: float
    best: float

    @property
    def reason(self) -> str:
        """One line."""
        return f"pruned at rung {self.rung}: loss {self.loss:.4f}, best {self.best:.4f}"


def loss_at(run: Run, until: int | None) -> float | None:
    """Validation loss at a step, or (none) of the finished run; none when it is not known."""
    if until is None:
        result = run.result()
        return None if result is None else float(result["validation_loss"])
    lines = read_metrics(run.path / runfolder.METRICS)
    found = [x["validation_loss"] for x in lines if x["step"] == until and "validation_loss" in x]
    return found[0] if found else None


class Course:
    """One arm's part of the race.

    Args:
        race, arm: which.
        diverged: whether a run has failed in a way that a repetition would not change.

    Attributes:
        runs: known so far: trials in order, then further seeds of the chosen one.
        stopped: trials that did not go on from a rung, by folder.
        chosen: the trial that the arm is judged by.
    """

    def __init__(self, race: Race, arm: Arm, diverged: Callable[[Run], bool]) -> None:
        self.race, self.arm = race, arm
        self.runs: list[Run] = []
        self.stopped: dict[str, Stop] = {}
        self.chosen: str | None = None
        self._diverged = diverged
        # The rungs, then the end.
        self._stops: list[int | None] = [*race.rungs, None]

    def waves(self) -> Iterator[list[Step]]:
        """Steps that may be done at the same time; the next wave is asked for when they ended."""
        if self.race.search is None:
            yield from self._finals(self.race.own_settings(self.arm), [])
            return
        yield from self._first()
        alive = self._go_on(list(self.runs), 0)
        for number in range(1, len(self._stops)):
            if alive:
                yield [Step(run, self._stops[number]) for run in alive]
                alive = self._go_on(alive, number)
        if alive:
            yield from self._finals(alive[0].settings, [alive[0]])

    def _finals(self, settings: dict[str, object], done: list[Run]) -> Iterator[list[Step]]:
        seeds = self.race.seeds[len(done) :]
        runs = [self.race.run(self.arm, settings, seed) for seed in seeds]
        self.chosen = (runs or done)[0].trial
        self.runs += runs
        if runs:
            yield [Step(run, None) for run in runs]

    def _first(self) -> Iterator[list[Step]]:
        """All trials up to the first rung; those of optuna learn from the ones before."""
        seed, until = self.race.seeds[0], self._stops[0]
        if self.arm.trials is not None:
            self.runs = [self.race.run(self.arm, each, seed) for each in self.arm.trials]
            yield [Step(run, until) for run in self.runs]
            return
        search = self.race.search
        assert search is not None
        drawn = Drawn(self.race.folder / self.arm.name / DRAWN, self.arm.space, seed)
        while len(self.runs) < self.race.trials:
            told = [(run.settings, self._told(run, until)) for run in self.runs]
            wave = []
            for _ in range(min(search.together, self.race.trials - len(self.runs))):
                number = len(told)
                if number == len(drawn.settings):
                    drawn.add(draw(search, self.arm.space, told, (seed, self.arm.name)))
                told.append((drawn.settings[number], None))
                wave.append(self.race.run(self.arm, drawn.settings[number], seed))
            self.runs += wave
            yield [Step(run, until) for run in wave]

    def _told(self, run: Run, until: int | None) -> float | None:
        loss = loss_at(run, until)
        return inf if loss is None and self._diverged(run) else loss

    def _go_on(self, alive: list[Run], number: int) -> list[Run]:
        """Who goes on from rung `number` (from 0; the last is the end, which one run wins)."""
        step = self._stops[number]
        losses = {run: loss_at(run, step) for run in alive}
        halving = self.race.config.halving
        if step is None or halving is None:
            return survivors(losses, 0.0)
        kept = survivors(losses, halving.keep)
        for run, loss in losses.items():
            if loss is not None and run not in kept:
                best = losses[kept[0]] or 0.0
                self.stopped[run.folder] = Stop(number + 1, step, loss, best)
        # In the order of the trials.
        return [run for run in alive if run in kept]
