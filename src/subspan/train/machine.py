"""What a run used: peak memory, versions, kind of machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, so that reading text does not count in training.

    Where the system cannot do that, the peak stays that of the whole process.
    """
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Largest resident memory of this process in bytes, and of its GPU if it uses one."""
    import torch

    peak = {"process": _peak_resident()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    # getrusage keeps the value of the process that started this one; the status file does not.
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe() -> dict[str, Any]:
    """Versions of the libraries that decide numbers, and the kind of machine."""
    import torch

    from subspan import __version__

    packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
    on_gpu = torch.cuda.is_available()
    return {
        "versions": {
            "subspan": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
        },
    }
