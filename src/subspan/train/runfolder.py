"""A run folder: which run it holds, and that only one process writes into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subspan.train.config import TrainConfig, parse
from subspan.train.errors import JobError
from subspan.train.files import write_text
from subspan.train.yamlfile import dump_yaml, load_yaml

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
RESULT = "result.json"
INPUTS = "inputs.json"
CHECKPOINTS = "checkpoints"
FINAL = "final"

_LOCK = ".lock"


def read_config(folder: Path) -> TrainConfig:
    """Configuration of the run in `folder`, with that folder as its output.

    Raises:
        JobError: the folder holds no run.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise JobError(f"folder {folder} holds no run ({CONFIG} is missing); give a run folder")
    return parse(TrainConfig, load_yaml(path) | {"output": str(folder)}, str(path))


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a finished run; none when the run is not finished.

    Raises:
        JobError: the file is damaged.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise JobError(f"{path} is damaged; delete it and run again to finish the run") from None
    return result


def check_output(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` already holds this very run (False: it is new or empty).

    Raises:
        JobError: it holds another run, other files, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise JobError(f"output {folder} is a file; choose another output folder")
    if not folder.exists() or all(_leftover(path.name) for path in folder.iterdir()):
        return False
    if not (folder / CONFIG).is_file():
        raise JobError(f"output folder {folder} holds other files; choose an empty or new folder")
    there, here = read_config(folder).identity(), config.identity()
    difference = first_difference(there, here)
    if difference:
        name, old, new = difference
        raise JobError(
            f"output folder {folder} holds another run ({name} is {old} there, {new} here); "
            "choose another output folder, or delete that one"
        )
    return True


def _leftover(name: str) -> bool:
    """Whether a process may leave this file when it is killed before the run's configuration is
    written: the lock, or the part of a file that was to replace another."""
    return name == _LOCK or name.startswith(f".{CONFIG}.")


def first_difference(
    there: dict[str, Any], here: dict[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """Name and both values of the first key that differs, looking into mappings."""
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = first_difference(old, new, f"{prefix}{name}.")
            if inner:
                return inner
        elif old != new:
            return prefix + name, old, new
    return None


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write config.yaml, from which the run can be repeated."""
    write_text(folder / CONFIG, dump_yaml(config.model_dump(mode="json")))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
        JobError: another process has it, or it cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise JobError(f"cannot write to output folder {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(
                f"output folder {folder} is in use by another process; wait for it or choose "
                "another folder"
            ) from None
        yield
