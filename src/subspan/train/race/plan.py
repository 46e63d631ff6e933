"""Which runs a comparison has, and that it is fair; nothing runs here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspan.train import runfolder
from subspan.train.config import TrainConfig, parse
from subspan.train.corpora import check_corpus
from subspan.train.errors import JobError
from subspan.train.job import check_method
from subspan.train.model import check_model_name
from subspan.train.race.config import CompareConfig, Range, SearchConfig, Space
from subspan.train.race.halving import rung_steps
from subspan.train.race.trials import Settings, distinct, grid, trial_name
from subspan.train.yamlfile import merge

_FIXED = ("output", "seed", "method", "model", "data", "steps", "tokens")


@dataclass(frozen=True)
class Run:
    """One run of the race.

    Attributes:
        arm, trial: names.
        settings: what varies within the arm.
        seed: of weights and data.
        folder: relative to the comparison's.
        config: of `subspan train`.
    """

    arm: str
    trial: str
    settings: Settings = field(hash=False)
    seed: int
    folder: str
    config: TrainConfig = field(hash=False, repr=False)

    @property
    def path(self) -> Path:
        """Run folder."""
        return Path(self.config.output)

    def result(self) -> dict[str, Any] | None:
        """result.json; none when the run is not finished."""
        return runfolder.read_result(self.path)


@dataclass(frozen=True)
class Arm:
    """One arm: its configuration and what is searched in it."""

    name: str
    base: TrainConfig
    space: Space
    trials: Sequence[Settings] | None
    """All trials of a grid; none: they are drawn as the race goes, or there is no search."""


@dataclass(frozen=True)
class Race:
    """A comparison that may start.

    Attributes:
        config: of the comparison.
        folder: of the comparison.
        arms: in order.
        tokens: budget of each full run.
        seeds: of the final runs; trials run with the first.
        rungs: steps after which trials are compared.
        trials: of each arm.
    """

    config: CompareConfig
    folder: Path
    arms: Mapping[str, Arm]
    tokens: int
    seeds: Sequence[int]
    rungs: Sequence[int]
    trials: int

    @property
    def search(self) -> SearchConfig | None:
        return self.config.search

    def run(self, arm: Arm, settings: Settings, seed: int) -> Run:
        """The run of an arm with these settings.

        Raises:
            JobError: a setting is unknown or has a value that is not allowed.
        """
        nested = self.search is not None or len(self.seeds) > 1
        trial = trial_name(settings)
        folder = f"{arm.name}/{trial}/seed-{seed}" if nested else arm.name
        changes: dict[str, Any] = {"seed": seed, "output": str(self.folder / folder)}
        for name, value in settings.items():
            for part in reversed(name.split(".")):
                value = {part: value}
            changes = merge(changes, value)
        values = merge(arm.base.model_dump(mode="json"), changes)
        config = parse(TrainConfig, values, f"arm {arm.name}, trial {trial}")
        return Run(arm.name, trial, settings, seed, folder, config)

    def own_settings(self, arm: Arm) -> Settings:
        """What names the only trial of an arm that is not searched."""
        return {"lr": arm.base.lr}


def plan_race(config: CompareConfig, methods: Sequence[str] | None = None) -> Race:
    """Check a comparison and lay out its arms.

    Args:
        config: the comparison.
        methods: arms to run; none: all of `config`. A name that is no arm of `config` is a method
            run with the job's fields.

    Raises:
        JobError: no arms, a name twice, an unknown method, a field that is not allowed, or a race
            that would not be fair.
    """
    names = list(methods or config.arms)
    if not names:
        raise JobError("nothing to compare: name arms in the configuration or with --methods")
    for name in names:
        if names.count(name) > 1:
            raise JobError(f"arm {name} is named twice in --methods")
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] == ".":
            raise JobError(f"arm name {name!r}: use letters, digits, '-', '_' and '.'")
    arms = {name: _arm(config, name) for name in names}
    tokens = {n: a.base.total_steps * a.base.tokens_per_step for n, a in arms.items()}
    _equal(tokens, "train on different numbers of tokens", "give them one budget")
    own = {arm.base.seed for arm in arms.values()}
    if config.seeds is None and len(own) > 1:
        raise JobError(f"arms have different seeds {sorted(own)}; give the job one, or seeds")
    rungs = {n: tuple(rung_steps(config.halving, arm.base)) for n, arm in arms.items()}
    _equal(rungs, "have rungs at different steps", "give them the same steps and eval_every")
    race = Race(
        config=config,
        folder=Path(config.output),
        arms=arms,
        tokens=next(iter(tokens.values())),
        seeds=config.seeds or [next(iter(own))],
        rungs=next(iter(rungs.values())),
        trials=_trials(config, arms),
    )
    for arm in arms.values():
        _check_runs(race, arm)
    return race


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _arm(config: CompareConfig, name: str) -> Arm:
    base = config.arm(name)
    if base.threads is None and (config.workers > 1 or config.ray is not None):
        # Part of the run's identity, so that a later start with other workers gives no mixture.
        share = 1 if config.ray is not None else max(1, cores() // config.workers)
        base = base.model_copy(update={"threads": share})
    space = config.space(name)
    for field_name in space:
        if field_name.split(".")[0] in _FIXED:
            raise JobError(f"arm {name}: {field_name} cannot be searched; every run shares it")
    if config.search is None:
        return Arm(name, base, space, None)
    if not space:
        raise JobError(f"arm {name}: nothing to search; give it a search, or search.fields")
    if config.search.sampler == "optuna":
        return Arm(name, base, space, None)
    try:
        trials = grid(space)
    except JobError as error:
        raise JobError(f"arm {name}: {error}") from None
    distinct(trials, name)
    return Arm(name, base, space, trials)


def _trials(config: CompareConfig, arms: Mapping[str, Arm]) -> int:
    if config.search is None:
        return 1
    counts = {n: len(a.trials) for n, a in arms.items() if a.trials is not None}
    if not counts:
        return config.search.trials or 1
    _equal(counts, "have different numbers of trials", "a fair race gives each the same")
    count = next(iter(counts.values()))
    if config.search.trials not in (None, count):
        raise JobError(
            f"search.trials={config.search.trials}, but the grid of each arm has {count} trials"
        )
    return count


def _equal(values: Mapping[str, Any], problem: str, remedy: str) -> None:
    if len(set(values.values())) > 1:
        shown = ", ".join(
            f"{name} {list(v) if isinstance(v, tuple) else format(v, ',')}"
            for name, v in values.items()
        )
        raise JobError(f"arms {problem} ({shown}); {remedy}")


def _check_runs(race: Race, arm: Arm) -> None:
    """Refuse what is known before the race: methods, options, folders."""
    try:
        if arm.trials is not None:
            runs = [race.run(arm, settings, race.seeds[0]) for settings in arm.trials]
        elif arm.space:
            runs = [race.run(arm, settings, race.seeds[0]) for settings in _corners(arm.space)]
        else:
            runs = [race.run(arm, race.own_settings(arm), seed) for seed in race.seeds]
        for run in runs:
            check_method(run.config.method, run.config.hyper())
        check_model_name(arm.base.model)
        check_corpus(arm.base.data.corpus, arm.base.data.packages)
        above = race.folder / arm.name
        if runs[0].path != above and (above / runfolder.CONFIG).is_file():
            raise JobError(
                f"output folder {above} holds a run of a comparison without search and seeds; "
                "choose another output folder"
            )
        for run in runs:
            runfolder.check_output(run.path, run.config)
            run.result()
    except JobError as error:
        text = str(error)
        raise JobError(text if text.startswith("arm ") else f"arm {arm.name}: {text}") from None


def _corners(space: Space) -> list[Settings]:
    """Both ends of every range and every listed value, each in some trial."""
    axes = {f: [v.low, v.high] if isinstance(v, Range) else list(v) for f, v in space.items()}
    longest = max(map(len, axes.values()), default=0)
    return [{f: axis[min(i, len(axis) - 1)] for f, axis in axes.items()} for i in range(longest)]
