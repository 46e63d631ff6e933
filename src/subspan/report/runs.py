"""One run folder as a report sees it; nothing here writes or needs torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from subspan.train import runfolder
from subspan.train.config import DataConfig, TrainConfig
from subspan.train.errors import JobError
from subspan.train.metrics import Line
from subspan.train.yamlfile import load_yaml

# As in subspan.train.recorder, which needs torch.
SUBSPACES = "subspaces.jsonl"

State = Literal["finished", "stopped", "failed", "running", "waiting", "unreadable"]


class _Memory(TypedDict):
    process: float


class _Result(TypedDict):
    """The fields of result.json that a report reads; there may be more."""

    method: str
    steps: int
    tokens: float
    validation_loss: float
    perplexity: float
    seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    state_bytes: dict[str, float]
    inputs: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    peak_memory_bytes: _Memory


_SCHEMA = TypeAdapter(_Result)


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        name: shown in the report.
        config: its configuration; none when it cannot be read, or the run failed before it began.
        result: result.json of a finished run, else none.
        lines: metrics lines.
        reason: why it has no result.
        state: what became of it.
        subspaces: lines of the recorder.
        arm, trial, settings, seed: its place in a comparison.
        steps, loss: how far it came, and the last validation loss.
        problem: what could not be read, in one line.
    """

    name: str
    config: TrainConfig | None
    result: dict[str, Any] | None
    lines: tuple[Line, ...] = ()
    reason: str | None = None
    state: State = "finished"
    subspaces: tuple[Line, ...] = ()
    arm: str = ""
    trial: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    steps: int = 0
    loss: float | None = None
    problem: str | None = None

    @property
    def state_bytes(self) -> int | None:
        """Bytes of optimizer state; none when the run is not finished."""
        return self.result["state_bytes"]["total"] if self.result else None


def load_run(folder: Path, name: str | None = None, reason: str | None = None) -> Run:
    """Read one run folder; what is damaged in it is left out and told in `problem`.

    Raises:
        JobError: there is no run, or no more of it than a name.
    """
    if not folder.exists():
        raise JobError(f"folder {folder} holds no run: it does not exist")
    problems: list[str] = []
    config = read_config(folder)
    result = None
    try:
        result = read_result(folder)
    except JobError as error:
        problems.append(str(error))
    lines = read_lines(folder / runfolder.METRICS, _is_metric, problems)
    subspaces = read_lines(folder / SUBSPACES, _is_subspace, problems)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    steps = lines[-1]["step"] if lines else 0
    state: State = "finished"
    if result is None:
        state = "unreadable" if problems else "stopped"
        reason = reason or (
            problems[0] if problems else f"not finished: step {steps} of {config.total_steps}"
        )
    return Run(
        name=name or folder.resolve().name,
        config=config,
        result=result,
        lines=tuple(lines),
        reason=reason if result is None else None,
        state=state,
        subspaces=tuple(subspaces),
        seed=config.seed,
        steps=steps,
        loss=result["validation_loss"] if result else (losses[-1] if losses else None),
        problem=problems[0] if problems else None,
    )


def read_config(folder: Path) -> TrainConfig:
    """Configuration of the run in `folder`.

    Raises:
        JobError: there is none, it is of another version or another program.
    """
    path = folder / runfolder.CONFIG
    if path.is_file():
        values = load_yaml(path)
        known = TrainConfig.model_fields.keys()
        data = values.get("data")
        unknown = [key for key in values if key not in known]
        if isinstance(data, dict):
            unknown += [f"data.{key}" for key in data if key not in DataConfig.model_fields]
        if "arms" in values:
            raise JobError(f"folder {folder} is a comparison that has not begun")
        if values and not values.keys() & {"method", "model", "data"}:
            raise JobError(f"folder {folder} holds no run: {path.name} is of another program")
        if unknown:
            raise JobError(
                f"{path} is of another version of subspan ({', '.join(map(str, unknown[:3]))} is "
                "not known here)"
            )
    return runfolder.read_config(folder)


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a finished run; none when the run is not finished.

    Raises:
        JobError: the file is damaged or of another version.
    """
    path = folder / runfolder.RESULT
    try:
        result = runfolder.read_result(folder)
        if result is not None:
            _SCHEMA.validate_python(result)
            if "total" not in result["state_bytes"]:
                raise JobError(f"{path} is of another version of subspan (state_bytes.total)")
    except UnicodeDecodeError:
        raise JobError(f"{path} is damaged: it is no text") from None
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        where = f" ({place} is missing or of another kind)" if place else ""
        raise JobError(f"{path} is of another version of subspan{where}") from None
    return result


def read_lines(path: Path, allowed: Any, problems: list[str]) -> list[Line]:
    """Lines of a file of JSON lines up to the first that is damaged.

    A last line that a crash cut short is no problem; any other is told in `problems`.
    """
    if not path.is_file():
        return []
    texts = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not allowed(line):
            if number < len(texts) or line is not None:
                problems.append(
                    f"{path} is damaged from line {number} on; the lines before are used"
                )
            break
        lines.append(line)
    return lines


def _numbers(line: Any, names: Iterable[str]) -> bool:
    """Whether the line has all of these, as finite numbers."""
    return isinstance(line, dict) and all(
        isinstance(line.get(name), int | float) and math.isfinite(line[name]) for name in names
    )


def _is_metric(line: Any) -> bool:
    return _numbers(line, ("step", "tokens", "seconds")) and (
        _numbers(line, ("loss",)) or _numbers(line, ("validation_loss",))
    )


def _is_subspace(line: Any) -> bool:
    names = ("overlap", "energy", "effective_rank")
    return (
        _numbers(line, ("step", "rank"))
        and isinstance(line.get("name"), str)
        and isinstance(line.get("shape"), list)
        and all(line.get(name) is None or _numbers(line, (name,)) for name in names)
    )
