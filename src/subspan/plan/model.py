"""The model that is planned: built without memory, as it would be built for training.

A named size, a folder or config.json of transformers, or a factory `module:function`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspan.plan.configs import LARGE, from_config, named_size, quietly, read_config
from subspan.plan.inputs import MakeInputs, example_inputs
from subspan.train.errors import JobError, one_line
from subspan.train.model import SIZES

if TYPE_CHECKING:
    from torch import nn

Dtype = Literal["float32", "bfloat16", "bfloat16-mixed"]
Attention = Literal["auto", "eager", "sdpa", "flash"]
BaseWeights = Literal["none", "int8", "int4"]

# The group of values that share a scale in 4-bit base weights, as in bitsandbytes.
INT4_GROUP = 64


@dataclass(frozen=True)
class ModelSpec:
    """What decides weights and code of a model.

    Args:
        source: named size, folder or config.json of transformers, or factory `module:function`.
        vocab_size: tokens; None: as configured (32 000 for named sizes, 4 096 for the smallest).
        sequence_length: tokens of a sequence, which must fit the model's positions.
        dtype: of the weights; bfloat16-mixed has float32 weights.
        attention: "auto" takes what transformers would.
        int8_weights: the blocks' linear weights are held in int8 (`subspan.layers`).
        adapter: folder or JSON file of a PEFT configuration; the base is frozen then.
        base_weights: how the frozen linear weights of the base are held.
    """

    source: str
    vocab_size: int | None = None
    sequence_length: int = 256
    dtype: Dtype = "bfloat16"
    attention: Attention = "auto"
    int8_weights: bool = False
    adapter: str | None = None
    base_weights: BaseWeights = "none"


@dataclass(frozen=True, eq=False)
class BuiltModel:
    """A model, on the meta device unless built for measuring.

    Args:
        spec: what it was built from; its source in its registered spelling.
        label: short name.
        module: the model, with adapters if there are any.
        parameters: of the model without adapters.
        make_inputs: a batch of inputs.
    """

    spec: ModelSpec
    label: str
    module: nn.Module
    parameters: int
    make_inputs: MakeInputs


def check_spec(spec: ModelSpec) -> None:
    """Refuse a model that does not exist and choices that disagree, before libraries are loaded.

    Raises:
        JobError: naming the choice and the remedy.
    """
    if spec.base_weights != "none" and spec.adapter is None:
        raise JobError(
            f"--base-weights {spec.base_weights} needs --adapter: only a frozen base can be held "
            "in few bits; for trained int8 weights use --int8-weights"
        )
    if spec.int8_weights and spec.adapter is not None:
        raise JobError(
            "--int8-weights trains the weights, but --adapter freezes them; use --base-weights int8"
        )
    path = Path(spec.source)
    if named_size(spec.source) or path.is_file() or _factory(spec.source):
        return
    if not path.is_dir():
        known = ", ".join([*SIZES, *LARGE])
        raise JobError(
            f"unknown model {spec.source!r}: not a folder, not a config.json, not module:function, "
            f"and not one of the named sizes {known}"
        )
    if not (path / "config.json").is_file():
        raise JobError(f"model folder {spec.source} has no config.json")


def meta_model(spec: ModelSpec) -> BuiltModel:
    """The model without memory, the same object as long as its files stay; see `build_model`."""
    check_spec(spec)
    return _cached_model(spec, tuple(_stamp(path) for path in (spec.source, spec.adapter)))


@cache
def _cached_model(spec: ModelSpec, stamps: tuple[tuple[int, ...], ...]) -> BuiltModel:
    return build_model(spec, "meta")


def _stamp(path: str | None) -> tuple[int, ...]:
    """Times of change of the files of a model or adapter."""
    if path is None or not Path(path).exists():
        return ()
    files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    return tuple(file.stat().st_mtime_ns for file in files)


def build_model(spec: ModelSpec, device: str) -> BuiltModel:
    """Build the model with random weights.

    Args:
        spec: the model.
        device: "meta" allocates nothing.

    Raises:
        JobError: it cannot be built; the line says why.
    """
    import torch

    check_spec(spec)
    size = named_size(spec.source)
    spec = replace(spec, source=size or spec.source)
    kind = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
    make_inputs: MakeInputs | None = None
    try:
        with quietly(), torch.device(device):
            if _factory(spec.source) and not size:
                module, make_inputs = _call_factory(spec)
                module = module.to(kind)
            else:
                module = from_config(read_config(spec, size), spec, kind)
    except JobError:
        raise
    except Exception as error:
        raise JobError(
            f"cannot build model {spec.source}: {type(error).__name__}: {one_line(error)}"
        ) from None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if spec.int8_weights:
        from subspan.layers import quantise_linear

        quantise_linear(module)
    if spec.adapter is not None:
        from subspan.plan.adapters import attach_adapter

        with quietly():
            module = attach_adapter(module, spec)
    if make_inputs is None:

        def make_inputs(batch_size: int, sequence_length: int) -> Any:
            return example_inputs(module, batch_size, sequence_length)

    return BuiltModel(spec, _label(spec), module, parameters, make_inputs)


def _label(spec: ModelSpec) -> str:
    if named_size(spec.source) or _factory(spec.source):
        return spec.source
    path = Path(spec.source)
    return path.parent.name or path.name if path.name == "config.json" else path.name


# ---------------------------------------------------------------------- factories


def _factory(source: str) -> re.Match[str] | None:
    if Path(source).exists():
        return None
    return re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)", source)


def _call_factory(spec: ModelSpec) -> tuple[nn.Module, MakeInputs | None]:
    """What `module:function` returns: a model, or a model and what makes its inputs."""
    from torch import nn

    found = _factory(spec.source)
    assert found is not None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(found[1]), found[2])
    except (ImportError, AttributeError) as error:
        raise JobError(f"--model {spec.source}: {one_line(error)}") from None
    made = function()
    module, make_inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise JobError(
            f"--model {spec.source} returned {type(module).__name__}; it must return a "
            "torch.nn.Module, or a pair of one and a function (batch_size, sequence_length) -> "
            "dict of inputs"
        )
    if isinstance(make_inputs, Mapping):
        fixed = dict(make_inputs)
        return module, lambda batch_size, sequence_length: fixed
    return module, make_inputs
