"""Configuration files: reading, merging and writing YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from subspan.train.errors import JobError


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win; a mapping is merged key by key with the mapping under it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            both = isinstance(below, dict) and isinstance(value, dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        JobError: the file cannot be read or is not such a file.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        reason = error.strerror or error
        raise JobError(f"cannot read configuration {path}: {reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise JobError(f"configuration {path} is not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise JobError(f"configuration {path} must be a mapping of keys to values")
    return values


def read_value(text: str, source: str) -> Any:
    """Read one YAML value: a number, a list, a mapping, or text.

    Raises:
        JobError: `text` is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        raise JobError(f"{source}: {text!r} is not valid YAML") from None


def _loader() -> Any:
    """YAML's safe loader that also reads 1e-3 as a number (YAML 1.1 wants 1.0e-3)."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text of `values` in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
