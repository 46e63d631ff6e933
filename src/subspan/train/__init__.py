"""Training jobs on `transformers.Trainer`: one run, or several methods compared.

Everything is imported on first use, so that `import subspan.train` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CompareConfig": "subspan.train.race.config",
    "DataConfig": "subspan.train.config",
    "JobError": "subspan.train.errors",
    "SubspanTrainer": "subspan.train.trainer",
    "TrainConfig": "subspan.train.config",
    "build_model": "subspan.train.model",
    "compare": "subspan.train.race.race",
    "optimizer_cls_and_kwargs": "subspan.train.trainer",
    "prepare_data": "subspan.train.data",
    "run_job": "subspan.train.job",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_EXPORTS[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
