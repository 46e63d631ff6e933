"""What a report is about: arms with their runs, from run folders and comparison folders.

Nothing that cannot be read stops a report: it becomes a line in `Report.problems` and a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from subspan.report.runs import Run, State, load_run
from subspan.train import runfolder
from subspan.train.errors import JobError
from subspan.train.race.results import RESULTS, Results, RunRow, read_results, same_inputs

_DEPTH = 3  # of a run folder below that of its comparison: arm, trial, seed


@dataclass(frozen=True)
class Arm:
    """One row of the results: the runs of one choice of settings with different seeds.

    Attributes:
        name: unique in the report.
        method: what it trains with.
        runs: that are drawn as its curve; several seeds are averaged.
        mean, spread: of what `subspan.train.race.results.MEASURES` names, over finished runs.
        seeds: finished runs.
        settings: what the search chose.
        reason: why there is no result, or why one of its runs has none.
        outlook: its state while the search has not chosen any run.
    """

    name: str
    method: str
    runs: tuple[Run, ...]
    mean: Mapping[str, float] | None = None
    spread: Mapping[str, float] | None = None
    seeds: int = 0
    settings: Mapping[str, Any] | None = None
    reason: str | None = None
    outlook: State = "failed"

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json of its first finished run."""
        return next((run.result for run in self.runs if run.result), None)

    @property
    def state(self) -> State:
        """What became of it: that of its runs which says most about a missing result."""
        states = {run.state for run in self.runs}
        order: tuple[State, ...] = ("unreadable", "failed", "running", "stopped", "waiting")
        if self.mean is not None:
            return "finished"
        return next((state for state in order if state in states), self.outlook)


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        title: of the first comparison, or made of the names.
        arms: in order; changes are against the first with a result.
        trials: runs of the search with its seed, also those that the arms were chosen from.
        races: results.json of every comparison, by the prefix that its arms' names have here.
        problems: one line for everything that could not be read.
        folders: that could be read.
    """

    title: str
    arms: tuple[Arm, ...]
    trials: tuple[Run, ...] = ()
    races: Mapping[str, Results] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    @property
    def runs(self) -> list[Run]:
        """Every run, each once: those of the arms, then the other trials."""
        runs = [run for arm in self.arms for run in arm.runs]
        shown = {(run.arm, run.trial, run.seed) for run in runs if run.trial}
        return runs + [t for t in self.trials if (t.arm, t.trial, t.seed) not in shown]

    @property
    def comparable(self) -> bool | None:
        """Whether all runs had the same inputs; none with fewer than two results."""
        results = [run.result for arm in self.arms for run in arm.runs if run.result]
        if len(results) < 2:
            return None
        try:
            return same_inputs(results)
        except KeyError:
            return False

    @property
    def searched(self) -> bool:
        """Whether a comparison searched settings."""
        return any(results["search"] for results in self.races.values())

    @property
    def seeded(self) -> bool:
        """Whether an arm has several seeds."""
        return any(arm.spread for arm in self.arms)

    @property
    def clocks(self) -> dict[str, Any]:
        """Arm -> its step times, where a comparison measured them in turn."""
        return {
            prefix + name: timed
            for prefix, results in self.races.items()
            if results["clock"] is not None
            for name, timed in results["clock"]["arms"].items()
        }


def load(folders: Sequence[Path]) -> Report:
    """Read run folders, comparison folders, and folders that hold some of either.

    Raises:
        JobError: nothing at all can be shown; with the first problem.
    """
    arms: list[Arm] = []
    trials: list[Run] = []
    races: dict[str, Results] = {}
    problems: list[str] = []
    title, shown = None, []
    for folder, name in _named(places(folders)):
        try:
            if (folder / RESULTS).is_file():
                results = read_results(folder)
                prefix = _prefix(folder, races)
                races[prefix] = results
                found = [_arm(folder, results, arm, prefix) for arm in results["arms"]]
                trials += _trials(results, prefix)
                title = title or results["title"]
            else:
                found = [_single(load_run(folder, name))]
            shown.append(folder)
            problems += [run.problem for arm in found for run in arm.runs if run.problem]
        except JobError as error:
            problems.append(str(error))
            found = [_unreadable(name, str(error))]
        arms += found
    if not shown:
        nothing = "no run to report on; give run folders or the folder of a comparison"
        raise JobError(problems[0] if problems else nothing)
    default = arms[0].name if len(arms) == 1 else "Comparison"
    unique = tuple(dict.fromkeys(problems))
    names = tuple(_distinct(arms))
    return Report(title or default, names, tuple(trials), races, unique, tuple(shown))


def places(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Folders and names: the given ones, or what is inside of one that only holds others.

    A damaged results.json gives itself, for its line, and the runs below it.
    """
    for folder in folders:
        name = folder.resolve().name
        if (folder / RESULTS).is_file():
            yield folder, name
            try:
                read_results(folder)
            except JobError as error:
                if "damaged" in str(error):
                    yield from _below(folder, _DEPTH)
        elif folder.is_dir() and not (folder / runfolder.CONFIG).is_file():
            yield from list(_below(folder, 1)) or [(folder, name)]
        else:
            yield folder, name


def _below(folder: Path, depth: int, above: str = "") -> Iterator[tuple[Path, str]]:
    """Run and comparison folders inside, at most `depth` levels down, in order."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        name = above + inner.name
        if (inner / RESULTS).is_file() or (inner / runfolder.CONFIG).is_file():
            yield inner, name
        elif depth > 1 and not inner.name.startswith("."):
            yield from _below(inner, depth - 1, f"{name}/")


def _named(found: Iterable[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Each folder once; names that occur twice get the name of the folder above."""
    once = dict(found)
    names = list(once.values())
    return [
        (folder, name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}")
        for folder, name in once.items()
    ]


def _prefix(folder: Path, races: Mapping[str, Results]) -> str:
    """What tells the arms of a second comparison from those of the first."""
    if not races:
        return ""
    name, number = folder.resolve().name, len(races) + 1
    return f"{name} {number}/" if f"{name}/" in races else f"{name}/"


def measures(result: Mapping[str, Any]) -> dict[str, float]:
    """result.json of one run as the numbers that arms are compared by."""
    peak = result["peak_memory_bytes"]
    names = ("validation_loss", "perplexity", "seconds", "tokens_per_second")
    return {name: result[name] for name in names} | {
        "state_bytes": result["state_bytes"]["total"],
        "peak_memory_bytes": peak.get("gpu") or peak["process"],
    }


def _single(run: Run) -> Arm:
    """A run on its own as an arm."""
    mean = measures(run.result) if run.result else None
    method = run.config.method if run.config else ""
    return Arm(run.name, method, (run,), mean, None, int(mean is not None), reason=run.reason)


def _unreadable(name: str, reason: str) -> Arm:
    return Arm(name, "", (Run(name, None, None, reason=reason, state="unreadable"),), reason=reason)


def _arm(folder: Path, results: Results, name: str, prefix: str) -> Arm:
    row = results["arms"][name]
    chosen = [r for r in results["runs"] if r["arm"] == name and r["trial"] == row["chosen"]]
    runs = tuple(_row_run(folder, each, prefix) for each in chosen)
    reason = row["failed"]
    outlook: State = "failed"
    if row["mean"] is None and reason is None:
        states = {each["state"] for each in results["runs"] if each["arm"] == name}
        outlook = "running" if "running" in states else "waiting"
        reason = "running" if "running" in states else "not finished"
    return Arm(
        prefix + name,
        row["method"],
        runs,
        row["mean"],
        row["spread"],
        row["seeds"],
        row["settings"],
        reason,
        outlook,
    )


def _row_run(folder: Path, row: RunRow, prefix: str) -> Run:
    """A run of a comparison from its folder, and where that says less, from results.json."""
    name = f"{prefix}{row['arm']}"
    try:
        run = load_run(folder / row["folder"], name, row["reason"])
    except JobError as error:
        # The folder of a run that failed before it began does not exist.
        begun = row["state"] in ("finished", "stopped")
        problem = str(error) if begun else None
        run = Run(name, None, None, reason=row["reason"] or problem, problem=problem)
    return replace(run, **_place(row, prefix))


def _place(row: RunRow, prefix: str) -> dict[str, Any]:
    return {
        "arm": prefix + row["arm"],
        "trial": row["trial"],
        "settings": row["settings"],
        "seed": row["seed"],
        "state": row["state"],
        "steps": row["steps"],
        "loss": row["validation_loss"],
    }


def _trials(results: Results, prefix: str) -> list[Run]:
    """What the search saw; the folders are not read."""
    if results["search"] is None:
        return []
    return [
        Run(f"{prefix}{row['arm']}", None, None, reason=row["reason"], **_place(row, prefix))
        for row in results["runs"]
        if row["seed"] == results["search"]["seed"]
    ]


def _distinct(arms: Sequence[Arm]) -> Iterator[Arm]:
    """The same arms, with numbers after names that occur again."""
    seen: dict[str, int] = {}
    for arm in arms:
        seen[arm.name] = seen.get(arm.name, 0) + 1
        again = seen[arm.name] > 1
        yield replace(arm, name=f"{arm.name} ({seen[arm.name]})") if again else arm
