"""Optimizer checkpoints: plain tensors, numbers and text.

A checkpoint is checked as a whole before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim import sharded_state
from subspan.optim.bucket import is_quantised
from subspan.subspaces.layout import Layout

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer


def plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose param groups describe parts given as objects in words."""
    groups = [
        {key: repr(value) if is_dataclass(value) else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def load(optimizer: SubspaceOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Replace the optimizer's hyper-parameters and state by a checkpoint's.

    Raises:
        ValueError: if the checkpoint is not one of this method, these parameters, or these shapes.
            Nothing has been changed then.
    """
    saved_groups = state_dict.get("param_groups")
    if not isinstance(saved_groups, list) or "state" not in state_dict:
        raise ValueError(
            "the checkpoint is not an optimizer state: it has no 'param_groups' and 'state'"
        )
    _check_groups(optimizer, saved_groups)
    before = [dict(group) for group in optimizer.param_groups]
    try:
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            for key, value in saved.items():
                if key not in ("params", "param_names") and not is_dataclass(group.get(key)):
                    group[key] = value
        loaded = _matched_state(optimizer, saved_groups, state_dict["state"])
    except Exception:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update(old)
        raise
    optimizer.state.clear()
    optimizer.state.update(loaded)


def _check_groups(optimizer: SubspaceOptimizer, saved_groups: list[dict[str, Any]]) -> None:
    own = optimizer.param_groups
    methods = {saved.get("method", "unknown") for saved in saved_groups}
    if methods != {own[0]["method"]}:
        raise ValueError(
            f"the checkpoint was written by method {', '.join(map(repr, sorted(methods)))}, "
            f"this optimizer is {own[0]['method']!r}"
        )
    if len(saved_groups) != len(own):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups, the optimizer {len(own)}"
        )
    for number, (group, saved) in enumerate(zip(own, saved_groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"param group {number} has {len(saved['params'])} parameters in the checkpoint, "
                f"{len(group['params'])} in the optimizer"
            )
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if names and saved_names and names != saved_names:
            other = next((a, b) for a, b in zip(saved_names, names, strict=True) if a != b)
            raise ValueError(
                f"param group {number} holds {other[0]!r} in the checkpoint where the optimizer "
                f"has {other[1]!r}"
            )
        for key, value in group.items():
            if is_dataclass(value) and saved.get(key) != repr(value):
                raise ValueError(
                    f"{key} is {saved.get(key)} in the checkpoint, {value!r} in the optimizer"
                )


def _matched_state(
    optimizer: SubspaceOptimizer, saved_groups: list[dict[str, Any]], saved_state: Mapping[Any, Any]
) -> dict[Tensor, dict[str, Any]]:
    """The checkpoint's state per parameter, with every shape checked against the declarations."""
    loaded: dict[Tensor, dict[str, Any]] = {}
    layouts: dict[Tensor, Layout] = {}
    pairs = chain.from_iterable(
        zip(group["params"], saved["params"], strict=True)
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)
    )
    for parameter, key in pairs:
        if key not in saved_state:
            continue
        saved = saved_state[key]
        if optimizer.sharding is not None:
            saved = sharded_state.gather(optimizer, parameter, saved)
        active = bool(saved.get("active", 1))
        layout = optimizer.layout_in(parameter, active)
        if "rank" in saved:  # chosen by energy in the run that was saved
            layout = replace(layout, rank=int(saved["rank"]))
            layouts[parameter] = layout
        parts = optimizer.parts_in(parameter, active)
        slots = parts.slots(layout, parameter.dtype) if parts else {}
        state: dict[str, Any] = {}
        for name, value in saved.items():
            if not isinstance(value, Tensor):
                state[name] = value
                continue
            if name not in slots:
                raise ValueError(
                    f"the checkpoint holds {name!r} for parameter {layout.name!r}, which this "
                    "method does not keep"
                )
            _, (shape, dtype) = slots[name]
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name!r} of parameter {layout.name!r} has shape {tuple(value.shape)} in the "
                    f"checkpoint, {shape} in this optimizer: rank, side or model differ"
                )
            weight = optimizer.weight_of(parameter)
            like = shape == weight.shape and not is_quantised(weight)
            target = torch.zeros_like(weight, dtype=dtype) if like else None
            copy = (
                torch.empty(shape, dtype=dtype, device=weight.device) if target is None else target
            )
            state[name] = copy.copy_(value)
        missing = [name for name in slots if name not in state]
        if missing and "step" in state:
            raise ValueError(f"the checkpoint lacks {missing[0]!r} for parameter {layout.name!r}")
        if optimizer.sharding is not None:
            state = sharded_state.kept(optimizer, parameter, state)
        loaded[parameter] = state
    for parameter, layout in layouts.items():
        optimizer.set_layout(parameter, layout)
    return loaded
