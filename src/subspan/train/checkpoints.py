"""Which checkpoint folders are complete, and whom they belong to.

`transformers.Trainer` writes the files of a checkpoint one after the other, so a kill or a full
disk leaves a folder that looks like a checkpoint. Here a checkpoint counts only when its manifest,
written last and after all files have reached the disk, names files of exactly the sizes there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from subspan.train.errors import JobError
from subspan.train.files import write_json

MANIFEST = "subspan.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def identity(method: str, hyper: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that resumes from it."""
    shapes = sorted((name, list(p.shape), p.requires_grad) for name, p in model.named_parameters())
    return {
        "method": method,
        # Through JSON, so that tuples compare equal to what is read back.
        "hyper": json.loads(json.dumps(hyper, default=str)),
        "parameters": len(shapes),
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }


def step_of(folder: Path) -> int | None:
    """Step in the name of a checkpoint folder; none when it is not named like one."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def commit(folder: Path, about: dict[str, Any]) -> None:
    """Make `folder` a complete checkpoint: flush its files, then write the manifest."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / MANIFEST, about | {"step": step_of(folder), "files": sizes})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Manifest of a complete checkpoint; none when files are missing or cut short."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        complete = all((folder / f).stat().st_size == n for f, n in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete else None


def last_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in `folder`; none when there is none."""
    found = [(step, path) for path in folder.glob("checkpoint-*") if (step := step_of(path))]
    return next((path for _, path in sorted(found, reverse=True) if read_manifest(path)), None)


def remove_incomplete(folder: Path) -> list[str]:
    """Delete torn checkpoints in `folder`; returns their names."""
    torn = [p for p in folder.glob("checkpoint-*") if step_of(p) and read_manifest(p) is None]
    for path in torn:
        shutil.rmtree(path)
    return sorted(path.name for path in torn)


def check_resumable(folder: Path, expected: dict[str, Any]) -> None:
    """Refuse a checkpoint that is torn or belongs to another method, option or model.

    Raises:
        JobError: naming what differs.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise JobError(f"checkpoint {folder} is incomplete; resume from an earlier one")
    remedy = "resume with the same settings or choose another output folder"
    if manifest["method"] != expected["method"]:
        raise JobError(
            f"checkpoint {folder} was written by method {manifest['method']}, "
            f"this run uses {expected['method']}; {remedy}"
        )
    if manifest["shapes"] != expected["shapes"]:
        raise JobError(
            f"checkpoint {folder} belongs to a model with other parameter shapes "
            f"({manifest['parameters']} parameters there, {expected['parameters']} here); {remedy}"
        )
    theirs, ours = manifest["hyper"], expected["hyper"]
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise JobError(
                f"checkpoint {folder} was written with {name}={theirs.get(name)}, "
                f"this run has {name}={ours.get(name)}; {remedy}"
            )
