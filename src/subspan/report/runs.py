"""Reading run folders for a report; nothing here writes or needs torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.train import runfolder
from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.metrics import Line, read_metrics

COMPARISON = "results.json"


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        name: shown in the report.
        config: its configuration; none when the run failed before it began.
        result: result.json of a finished run, else none.
        lines: metrics lines.
        reason: why it has no result.
    """

    name: str
    config: TrainConfig | None
    result: dict[str, Any] | None
    lines: tuple[Line, ...] = ()
    reason: str | None = None

    @property
    def state_bytes(self) -> int | None:
        """Bytes of optimizer state; none when the run is not finished."""
        return self.result["state_bytes"]["total"] if self.result else None


def load_run(folder: Path, name: str | None = None, reason: str | None = None) -> Run:
    """Read one run folder.

    Raises:
        JobError: the folder holds no run, or a damaged one.
    """
    config = runfolder.read_config(folder)
    result = runfolder.read_result(folder)
    lines = tuple(read_metrics(folder / runfolder.METRICS))
    if result is None and reason is None:
        last = lines[-1]["step"] if lines else 0
        reason = f"not finished: step {last} of {config.total_steps}"
    return Run(name or folder.name, config, result, lines, reason)


def load_runs(folders: Sequence[Path]) -> tuple[str | None, list[Run]]:
    """Title (of a comparison) and runs of run folders and comparison folders, in order.

    Raises:
        JobError: a folder holds neither, or no folder is given.
    """
    title = None
    runs: list[Run] = []
    for folder in folders:
        if (folder / COMPARISON).is_file():
            about = _read_comparison(folder)
            title = title or about["title"]
            for name, arm in about["arms"].items():
                reason = arm.get("failed")
                if (folder / name / runfolder.CONFIG).is_file():
                    runs.append(load_run(folder / name, name, reason))
                else:
                    runs.append(Run(name, None, None, (), reason))
        else:
            runs.append(load_run(folder))
    if not runs:
        raise JobError("no run to report on; give run folders or the folder of a comparison")
    return title, runs


def _read_comparison(folder: Path) -> dict[str, Any]:
    path = folder / COMPARISON
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        about["title"], about["arms"].items()
    except (ValueError, KeyError, AttributeError, TypeError):
        raise JobError(f"{path} is damaged; run the comparison again to write it anew") from None
    return about
