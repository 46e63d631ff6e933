"""From command-line flags to configuration: which field a flag sets, and reading its value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspan.train import runfolder
from subspan.train.config import DataConfig, TrainConfig, parse
from subspan.train.errors import JobError
from subspan.train.yamlfile import load_yaml, merge, read_value


def fields(flags: Mapping[str, Any], settings: Sequence[str] = ()) -> dict[str, Any]:
    """Configuration fields that flags and `KEY=VALUE` settings give, nested as in a file.

    Flags that were not given are None. A flag whose name is a field of the `data` section is put
    there. Text of `rank` and `warmup`, and of settings, is read as YAML; that of `track` is a list
    separated by commas, or none.

    Raises:
        JobError: a setting without '=' or with a value that is no YAML.
    """
    given: dict[str, Any] = {}
    for name, value in flags.items():
        # A flag that can be repeated comes as an empty sequence when it is not given.
        if value is None or (isinstance(value, list | tuple) and not value):
            continue
        if isinstance(value, Path):
            value = str(value)
        if name in ("rank", "warmup"):
            value = read_value(value, f"--{name}")
        if name == "track":
            value = [word.strip() for word in value.split(",") if word.strip() not in ("", "none")]
        if name == "corpus":
            value = value[0] if len(value) == 1 else list(value)
        given = merge(given, {"data": {name: value}} if _in_data(name) else {name: value})
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise JobError(f"--set {setting}: write KEY=VALUE, for example --set seed=1")
        nested = read_value(text, f"--set {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        given = merge(given, nested)
    return given


def _in_data(name: str) -> bool:
    return name in DataConfig.model_fields and name not in TrainConfig.model_fields


def train_config(
    file: Path | None, given: dict[str, Any], resume: Path | None = None
) -> TrainConfig:
    """Configuration of a run: defaults, under a file or an existing run, under flags.

    Raises:
        JobError: see `parse`; also when both a file and a run are named.
    """
    if resume is not None:
        if file is not None:
            raise JobError("--resume takes the configuration from the run folder; drop --config")
        base = runfolder.read_config(resume).model_dump(mode="json")
        return parse(TrainConfig, merge(base, given), str(resume / runfolder.CONFIG))
    source = str(file) if file is not None else "command line"
    return parse(TrainConfig, merge(load_yaml(file) if file else {}, given), source)
