"""Where a race stands: from run folders and courses to the content of results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from subspan.train import runfolder
from subspan.train.metrics import read_metrics
from subspan.train.race.course import Course
from subspan.train.race.plan import Race, Run
from subspan.train.race.process import DIVERGED
from subspan.train.race.results import (
    MEASURES,
    VERSION,
    ArmRow,
    ClockRow,
    Results,
    RunRow,
    SearchRow,
    same_inputs,
)


def measures(result: Mapping[str, Any]) -> dict[str, float]:
    """What is averaged over seeds, from result.json."""
    peak = result["peak_memory_bytes"]
    own = {
        "state_bytes": result["state_bytes"]["total"],
        "peak_memory_bytes": peak.get("gpu") or peak["process"],
    }
    return {name: own[name] if name in own else result[name] for name in MEASURES}


class Board:
    """Rows of every run and arm.

    Args:
        race: the race.
        previous: results of an earlier start; failures that would repeat are taken from there.
    """

    def __init__(self, race: Race, previous: Results | None) -> None:
        self.race = race
        self.running: set[str] = set()
        self.failures: dict[str, str] = {}
        self.clock: ClockRow | None = None
        self._results: dict[str, dict[str, Any]] = {}
        if previous is not None:
            self.clock = previous["clock"]
            for row in previous["runs"]:
                if row["state"] == "failed" and (row["reason"] or "").startswith(DIVERGED):
                    self.failures[row["folder"]] = row["reason"] or ""

    def diverged(self, run: Run) -> bool:
        """Whether the run failed in a way that a repetition would not change."""
        return self.failures.get(run.folder, "").startswith(DIVERGED)

    def result(self, run: Run) -> dict[str, Any] | None:
        """result.json, read once."""
        if run.folder not in self._results:
            found = run.result()
            if found is None:
                return None
            self._results[run.folder] = found
        return self._results[run.folder]

    def results(self, courses: Sequence[Course]) -> Results:
        """Content of results.json."""
        config, runs = self.race.config, [run for course in courses for run in course.runs]
        done = [result for run in runs if (result := self.result(run)) is not None]
        return Results(
            version=VERSION,
            title=config.title,
            same_inputs=same_inputs(done),
            tokens=self.race.tokens,
            search=self._search(),
            seeds=list(self.race.seeds),
            runs=[self.row(course, run) for course in courses for run in course.runs],
            arms={course.arm.name: self.arm(course) for course in courses},
            clock=self.clock,
        )

    def _search(self) -> SearchRow | None:
        config = self.race.config
        if config.search is None:
            return None
        return SearchRow(
            sampler=config.search.sampler,
            trials=self.race.trials,
            rungs=list(self.race.rungs),
            keep=config.halving.keep if config.halving is not None else None,
            seed=self.race.seeds[0],
        )

    def row(self, course: Course, run: Run) -> RunRow:
        """One run as it is now; a stopped one as it was at its rung, however far it came."""
        stop, result = course.stopped.get(run.folder), self.result(run)
        row = RunRow(
            arm=run.arm,
            trial=run.trial,
            settings=run.settings,
            seed=run.seed,
            role="final" if run.trial == course.chosen else "trial",
            folder=run.folder,
            state="running" if run.folder in self.running else "waiting",
            steps=0,
            rung=None,
            validation_loss=None,
            reason=None,
        )
        if stop is not None:
            row["state"], row["reason"] = "stopped", stop.reason
            row["steps"], row["validation_loss"] = stop.step, stop.loss
        elif result is not None:
            row["state"] = "finished"
            row["steps"], row["validation_loss"] = result["steps"], result["validation_loss"]
        else:
            lines = read_metrics(run.path / runfolder.METRICS)
            losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
            row["steps"] = lines[-1]["step"] if lines else 0
            row["validation_loss"] = losses[-1] if losses else None
            if run.folder in self.failures:
                row["state"], row["reason"] = "failed", self.failures[run.folder]
        if self.race.rungs:
            row["rung"] = sum(step <= row["steps"] for step in self.race.rungs)
        return row

    def arm(self, course: Course) -> ArmRow:
        """One arm as it is now."""
        finals = [run for run in course.runs if run.trial == course.chosen]
        found = [measures(result) for run in finals if (result := self.result(run)) is not None]
        columns = {name: [float(each[name]) for each in found] for name in MEASURES}
        return ArmRow(
            method=course.arm.base.method,
            chosen=course.chosen,
            settings=finals[0].settings if finals else {},
            seeds=len(found),
            mean={n: statistics.fmean(v) for n, v in columns.items()} if found else None,
            spread={n: statistics.stdev(v) for n, v in columns.items()} if len(found) > 1 else None,
            failed=self._failed(course, finals),
        )

    def _failed(self, course: Course, finals: Sequence[Run]) -> str | None:
        """Why a final run, or every trial, has no result."""
        if course.chosen is None:
            reasons = [self.failures[r.folder] for r in course.runs if r.folder in self.failures]
            if len(course.runs) < self.race.trials or len(reasons) + len(course.stopped) < len(
                course.runs
            ):
                return None
            return f"no trial is left; the last failed: {reasons[-1]}" if reasons else None
        for run in finals:
            if run.folder in self.failures and self.result(run) is None:
                reason = self.failures[run.folder]
                return f"seed {run.seed}: {reason}" if len(finals) > 1 else reason
        return None
