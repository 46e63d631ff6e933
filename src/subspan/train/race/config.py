"""What a comparison is: the job, its arms, and how they are searched, repeated and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from subspan.train.config import Count, Positive, Section, Share, TrainConfig, parse
from subspan.train.errors import JobError
from subspan.train.yamlfile import merge


class Range(Section):
    """Values between two ends; whole numbers when both ends are."""

    low: int | float
    high: int | float
    log: bool = True
    """Evenly spaced (grid) or drawn (optuna) on a logarithmic scale."""
    points: Positive | None = None
    """With `sampler: grid`, how many values."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} must be above 0 on a logarithmic scale")
        return self


def _kind(value: Any) -> str:
    return "range" if isinstance(value, dict | Range) else "list"


Values = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(_kind),
]
Space = dict[str, Values]
"""Field of a run (dotted for nested ones) -> its values."""


class SearchConfig(Section):
    """A search with the same number of trials in every arm, judged by validation loss."""

    sampler: Literal["grid", "optuna"] = "grid"
    """grid: every combination; optuna: its tree-structured Parzen estimator."""
    trials: Positive | None = None
    """Trials of every arm. A grid may leave it out; all grids must then have one size."""
    together: Positive = 1
    """With optuna, trials of one arm that are drawn, and may run, at the same time."""
    fields: Space = Field(default_factory=dict)
    """What varies in arms without a `search` of their own."""

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        if self.sampler == "optuna" and self.trials is None:
            raise ValueError("sampler=optuna needs trials, the number of trials of every arm")
        return self


class HalvingConfig(Section):
    """Successive halving: all trials of an arm run to the first rung, the best go on."""

    rungs: list[Share] = Field(default_factory=lambda: [0.25, 0.5], min_length=1)
    """Shares of the run, rising; each is moved to the nearest evaluation."""
    keep: Share = 0.5
    """Share of the trials that goes on from a rung, rounded up."""

    @model_validator(mode="after")
    def _check(self) -> HalvingConfig:
        if sorted(set(self.rungs)) != self.rungs:
            raise ValueError(f"rungs={self.rungs} must rise")
        return self


class ClockConfig(Section):
    """Timing of the arms after the race, step by step in turn."""

    rounds: Annotated[int, Field(ge=3)] = 20
    """Timed steps of every arm."""
    processes: Literal["auto", "one", "turns"] = "auto"
    """one: all arms in one process; turns: a process per arm and a few steps, in turn; auto: one
    when the memory that the runs took fits."""


class CompareConfig(Section):
    """The same job for several methods: shared fields, and per arm what differs."""

    output: str = "runs/compare"
    """Folder of the comparison; the run folders lie in it."""
    title: str = "Comparison"
    job: dict[str, Any] = Field(default_factory=dict)
    """Fields of every arm's run."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Arm name -> fields that differ; `method` is the arm's name unless given, and `search` holds
    the arm's own values of what is searched."""

    search: SearchConfig | None = None
    halving: HalvingConfig | None = None
    seeds: Annotated[list[Count], Field(min_length=1)] | None = None
    """Seeds of the final runs; the search uses the first. None: the job's `seed` alone."""
    clock: ClockConfig | None = None

    workers: Positive = 1
    """Runs at the same time on this machine; they share its cores."""
    ray: str | None = None
    """Run on a Ray cluster instead: its address, `auto`, or `local` to start one here."""

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        if self.halving is not None and self.search is None:
            raise ValueError("halving needs a search")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must differ")
        return self

    def arm(self, name: str) -> TrainConfig:
        """Configuration of one arm, before anything is searched.

        Raises:
            JobError: a field is unknown or has a value that is not allowed.
        """
        own = {key: value for key, value in self.arms.get(name, {}).items() if key != "search"}
        values = merge(self.job, {"method": name}, own)
        if "output" in values:
            raise JobError(f"arm {name}: output is set by the comparison; remove it from the job")
        if self.seeds is not None and "seed" in values:
            raise JobError(f"arm {name}: seed is set by seeds; remove it from the job")
        values["output"] = str(Path(self.output) / name)
        return parse(TrainConfig, values, f"arm {name}")

    def space(self, name: str) -> Space:
        """What is searched in arm `name`: field -> values.

        Raises:
            JobError: the arm's own `search` is not such a mapping, or there is no search.
        """
        own = self.arms.get(name, {}).get("search")
        if self.search is None:
            # `search: null` says that arms are not to be searched this time.
            if own is not None and "search" not in self.model_fields_set:
                raise JobError(f"arm {name} has a search; give the comparison one (search: ...)")
            return {}
        if own is None:
            return self.search.fields
        return parse(_Own, {"search": own}, f"arm {name}").search


class _Own(Section):
    search: Space


def compare_config(file: Path | None, given: dict[str, Any]) -> CompareConfig:
    """Configuration of a comparison: a file, overridden by what flags give.

    Args:
        file: YAML file; none: defaults.
        given: nested fields. A name that only a comparison has (`workers`, `search`, ...) is its;
            any other is a field of the job.

    Raises:
        JobError: see `parse`.
    """
    from subspan.train.yamlfile import load_yaml

    own = CompareConfig.model_fields.keys() - TrainConfig.model_fields.keys() | {"output"}
    top = {key: value for key, value in given.items() if key in own}
    job = {key: value for key, value in given.items() if key not in own}
    values = merge(load_yaml(file) if file else {}, top, {"job": job} if job else {})
    return parse(CompareConfig, values, str(file) if file is not None else "command line")
