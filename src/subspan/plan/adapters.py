"""Adapters of PEFT on the planned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspan.train.errors import JobError, one_line

if TYPE_CHECKING:
    from torch import nn

    from subspan.plan.model import ModelSpec


def attach_adapter(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The model with the adapters of a PEFT configuration, its base frozen and held as chosen.

    Args:
        model: changed in place.
        spec: names the configuration and how base weights are held.

    Raises:
        JobError: PEFT is not installed, or cannot read or attach the configuration.
    """
    from subspan.layers import quantise_linear
    from subspan.plan.model import INT4_GROUP

    assert spec.adapter is not None
    values = _read(Path(spec.adapter))
    try:
        import peft
    except ImportError:
        raise JobError("--adapter needs the package peft; pip install peft") from None
    if spec.base_weights == "int8":
        quantise_linear(model)
    elif spec.base_weights == "int4":
        quantise_linear(model, group=INT4_GROUP, bits=4)
    try:
        adapted: Any = peft.get_peft_model(model, peft.get_peft_config(values))
    except Exception as error:
        raise JobError(
            f"PEFT cannot attach {spec.adapter}: {type(error).__name__}: {one_line(error)}"
        ) from None
    return adapted


def _read(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JobError(f"cannot read adapter configuration {file}: {one_line(error)}") from None
    if not isinstance(values, dict) or "peft_type" not in values:
        raise JobError(f"{file} is no configuration of PEFT: it has no peft_type")
    return values
