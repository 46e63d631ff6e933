"""Reading and cutting a run's metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from subspan.train.files import write_text

Line = dict[str, Any]


def read_metrics(path: Path) -> list[Line]:
    """Lines of a metrics file; a last line that a crash cut short is left out."""
    lines: list[Line] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def keep_metrics(path: Path, last_step: int) -> list[Line]:
    """Drop the lines after `last_step`, which a resumed run will write again."""
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def perplexity(loss: float) -> float:
    """exp(loss), or about the largest float when that overflows."""
    return math.exp(min(loss, 700.0))
