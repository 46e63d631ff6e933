"""What a measurement has to be read with: machine, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "subspan",
    "torch",
    "galore-torch",
    "fira",
    "apollo-torch",
    "pytorch_optimizer",
    "bitsandbytes",
    "torchao",
    "q-galore-torch",
    "badam",
    "flora-opt",
    "transformers",
    "accelerate",
)
FOLDER_VARIABLE = "SUBSPAN_OFFICIAL_CODE"
# Authors' code that is in no package index. Folder name: the public repository on GitHub, and the
# commit that it was made to run with.
REPOSITORIES = {
    "AuON": "ryyzn9/AuON@bba2e82",
    "FRUGAL": "fzmushko/FRUGAL@c7ebe4c",
    "ISTA-DASLab-Optimizers": "IST-DASLab/ISTA-DASLab-Optimizers@4c98e6e",
    "LBP-WHT": "SLDGroup/LBP-WHT@967c816",
    "LDAdam": "IST-DASLab/LDAdam@f3c5daf",
    "Online-Subspace-Descent": "kyleliang919/Online-Subspace-Descent@e694775",
    "SubTrack": "criticalml-uw/SubTrack@94f2b65",
    "coap": "bytedance/coap@deabc3a",
    "sn-sm": "timmytonga/sn-sm@a4c1a4a",
}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vector = next((v for v in ("avx512f", "avx2") if v in flags), "")
    return f"{names[0] if names else platform.machine()} ({vector or 'no AVX'})"


def _package_version(name: str) -> str:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "not installed"


def official_folder(repository: str) -> Path | None:
    """Where a repository lies, or None if it is not there."""
    root = os.environ.get(FOLDER_VARIABLE)
    folder = Path(root).expanduser() / repository if root else None
    return folder if folder is not None and folder.is_dir() else None


def _command(arguments: list[str]) -> str:
    """The command without the place of the JSON file, which changes nothing."""
    kept = list(arguments)
    if "--json" in kept:
        at = kept.index("--json")
        del kept[at : at + 2]
    return " ".join(["python -m benchmarks", *kept])


def describe() -> dict[str, object]:
    """Plain facts about this run."""
    tuned = sorted(k for k in os.environ if k.startswith("MALLOC_") or k == "LD_PRELOAD")
    return {
        "date": datetime.date.today().isoformat(),
        "command": _command(sys.argv[1:]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "malloc": ", ".join(tuned) if tuned else "default",
        "versions": {name: _package_version(name) for name in _PACKAGES},
        "official": {name: at for name, at in REPOSITORIES.items() if official_folder(name)},
    }
