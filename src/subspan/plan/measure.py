"""One real step in a clean process, part by part against the plan.

Tensors are counted exactly. The resident peak is the kernel's high-water mark of the process above
what it held before the model was built, after a rehearsal with a tiny model: libraries, their
caches and threads are not the model's. On a GPU the peak is that of PyTorch's allocator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from subspan.plan.model import ModelSpec
from subspan.plan.planning import make_plan
from subspan.plan.result import Plan
from subspan.plan.settings import Settings
from subspan.train.errors import JobError

# How much larger than planned the process may be before it is not started.
_MARGIN = 1.15
# glibc keeps most of what is freed for later, the more the longer a process runs; with a fixed
# threshold it gives large blocks back at once, and what is resident is what is in use.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Comparison:
    """A plan and what was measured, in bytes.

    Args:
        plan: of the first period, where a method has periods.
        parts: measured bytes of weights, buffers, gradients and every kind of state.
        peak: measured.
        program: resident memory of the process without the model.
        where: what was measured on.
    """

    plan: Plan
    parts: Mapping[str, int]
    peak: int
    program: int
    where: str

    def rows(self) -> list[tuple[str, int, int, bool]]:
        """(part, planned, measured, whether they must be equal)."""
        plan = self.plan
        planned = {"weights": plan.weights, "buffers": plan.buffers, "gradients": plan.gradients}
        planned |= plan.states
        names = dict.fromkeys([*planned, *self.parts])
        rows = [(name, planned.get(name, 0), self.parts.get(name, 0), True) for name in names]
        if plan.peak is not None:
            rows.append(("peak", plan.peak.total, self.peak, False))
        return rows


def measure(settings: Settings) -> Comparison:
    """Run one real step (two, of which the first allocates the states) and compare.

    Raises:
        JobError: the model does not fit, cannot be built here, or the process failed.
    """
    import torch

    if settings.ranks > 1:
        raise JobError("--measure runs one process; leave out --ranks")
    if settings.model.base_weights == "int4":
        raise JobError("--base-weights int4 is planned only: no layer of this library holds them")
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    settings = replace(settings, device=device)
    plan = make_plan(settings, period=0)
    _check_fits(plan, device)
    done = subprocess.run(
        [sys.executable, "-m", "subspan.plan.measured"],
        input=json.dumps(_packed(settings)),
        capture_output=True,
        text=True,
        env={**os.environ, **_ALLOCATOR},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        how = f"killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise JobError(f"the measuring process {how}: {lines[-1] if lines else 'no message'}")
    return Comparison(plan, **json.loads(done.stdout.splitlines()[-1]))


def _check_fits(plan: Plan, device: str) -> None:
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _available()
    if plan.needed * _MARGIN > free:
        raise JobError(
            f"--measure: {plan.label} needs about {plan.needed / 1e9:.2f} GB and {free / 1e9:.2f} "
            f"GB are free here; measure a smaller model or batch"
        )


def _available() -> int:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return sys.maxsize
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _packed(settings: Settings) -> dict[str, Any]:
    values = asdict(settings)
    values["options"] = dict(settings.options)
    return values


def unpacked(values: dict[str, Any]) -> Settings:
    """Settings that came as JSON."""
    return Settings(**{**values, "model": ModelSpec(**values["model"])})
