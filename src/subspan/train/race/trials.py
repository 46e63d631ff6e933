"""Which settings the trials of an arm have: a grid, or optuna's draws.

Optuna's draws are repeatable: each comes from a sampler of its own, seeded by arm and number, that
is told only what earlier draws gave. Drawn settings are also kept on disk (`Drawn`), so that a run
that failed once and succeeds later does not change the trials after it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspan.train.errors import JobError
from subspan.train.files import write_json
from subspan.train.race.config import Range, SearchConfig, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Settings = dict[str, Any]

_ATTEMPTS = 50
_DIGITS = 3


def trial_name(settings: Mapping[str, Any]) -> str:
    """Folder name of a trial: `lr-0.01-rank-64`."""
    return "-".join(f"{name.split('.')[-1]}-{_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "-+._" else "_" for c in text) or "_"


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def points(values: list[Any] | Range, field: str) -> list[Any]:
    """The values of one field in a grid; those of a range rounded to three digits.

    Raises:
        JobError: a range does not say how many points it has.
    """
    if not isinstance(values, Range):
        return values
    if values.points is None:
        raise JobError(
            f"search of {field}: a range needs points (how many values) in a grid, or "
            "sampler: optuna"
        )
    shares = [i / (values.points - 1) if values.points > 1 else 0.5 for i in range(values.points)]
    if values.log:
        low, high = math.log(values.low), math.log(values.high)
        found = [_rounded(math.exp(low + share * (high - low))) for share in shares]
    else:
        found = [_rounded(values.low + share * (values.high - values.low)) for share in shares]
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    return [round(value) for value in found] if whole else found


def grid(space: Space) -> list[Settings]:
    """Every combination; the last field varies fastest."""
    axes = [points(values, field) for field, values in space.items()]
    return [dict(zip(space, cell, strict=True)) for cell in itertools.product(*axes)]


def distinct(trials: Sequence[Settings], arm: str) -> None:
    """Refuse trials whose folders would have the same name.

    Raises:
        JobError: naming the first such trial.
    """
    names = [trial_name(settings) for settings in trials]
    for name in names:
        if names.count(name) > 1:
            raise JobError(f"arm {arm}: trial {name} is there twice; give each value once")


def draw(
    search: SearchConfig,
    space: Space,
    before: Sequence[tuple[Settings, float | None]],
    seed: tuple[int, str],
) -> Settings:
    """The next trial that optuna asks for, unlike all before it.

    Args:
        search: how many trials there will be.
        space: field -> values.
        before: settings and validation loss of earlier trials in their order; infinite when the
            run diverged, none when it is not known.
        seed: of the draw, and the arm's name.

    Raises:
        JobError: optuna is missing, or the space has no other trial.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise JobError(
            "sampler=optuna needs the package optuna; pip install 'subspan[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {field: _distribution(values) for field, values in space.items()}
    taken = {trial_name(settings) for settings, _ in before}
    told = [
        optuna.trial.create_trial(
            params={f: _inside(settings[f], space[f]) for f in space},
            distributions=distributions,
            value=loss,
        )
        for settings, loss in before
        if loss is not None
    ]
    for attempt in range(_ATTEMPTS):
        text = json.dumps([*seed, len(before), attempt])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        startup = max(2, (search.trials or 0) // 3)
        sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=startup)
        study = optuna.create_study(sampler=sampler)
        study.add_trials(told)
        found = study.ask(distributions).params
        settings = {f: _settled(found[f], values) for f, values in space.items()}
        if trial_name(settings) not in taken:
            return settings
    raise JobError(f"arm {seed[1]}: the search has only {len(taken)} different trials; widen it")


def _distribution(values: list[Any] | Range) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not isinstance(values, Range):
        # Optuna takes plain values only; a position stands for any.
        return CategoricalDistribution(list(range(len(values))))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _settled(found: Any, values: list[Any] | Range) -> Any:
    if not isinstance(values, Range):
        return values[found]
    return found if isinstance(found, int) else _rounded(found)


def _inside(value: Any, values: list[Any] | Range) -> Any:
    """The parameter for optuna: rounding may have put a value just outside its range."""
    if not isinstance(values, Range):
        return values.index(value)
    return min(max(value, values.low), values.high)


class Drawn:
    """Drawn settings of one arm in a file, which a later start takes them from.

    Args:
        path: of the file.
        space: what the settings are drawn from.
        seed: of the draws.

    Raises:
        JobError: the file is damaged, or its settings were drawn from something else.
    """

    def __init__(self, path: Path, space: Space, seed: int) -> None:
        self._path = path
        self._source = {"seed": seed, "space": json.loads(json.dumps(dict(_plain(space))))}
        self.settings: list[Settings] = []
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                source, self.settings = found["source"], list(found["trials"])
            except (ValueError, KeyError, TypeError):
                raise JobError(
                    f"{path} is damaged; delete it to draw the same trials again"
                ) from None
            if source != self._source:
                raise JobError(
                    f"{path} holds trials of another search; choose another output folder, or "
                    "delete that one"
                )

    def add(self, settings: Settings) -> None:
        """Keep one more trial."""
        self.settings.append(settings)
        write_json(self._path, {"source": self._source, "trials": self.settings})


def _plain(space: Space) -> Iterable[tuple[str, Any]]:
    for field, values in space.items():
        yield field, values.model_dump() if isinstance(values, Range) else values
