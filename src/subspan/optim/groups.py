"""Param groups: which of their tensors are projected, and how each tensor is laid out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspan.optim.composition import Composition
from subspan.optim.selection import is_projected_by_name
from subspan.subspaces.layout import Layout, matrix_view, projection_side, resolve_rank


def unique(parameters: Any) -> list[Any]:
    """The parameters (or named ones) in order, each once: tied weights are updated once.

    Raises:
        TypeError: for a set, whose order differs from run to run.
    """
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, set):
        raise TypeError("parameters must be in an order that is the same in every run; got a set")
    seen: dict[int, Any] = {}
    for item in parameters:
        seen.setdefault(id(item[1] if isinstance(item, tuple) else item), item)
    return list(seen.values())


def check_parameters(parameters: list[Any]) -> None:
    """Refuse tensors that the engine cannot update.

    Raises:
        TypeError: for sharded parameters.
    """
    for item in parameters:
        tensor = item[1] if isinstance(item, tuple) else item
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                "a parameter is sharded (DTensor): sharded parameters are not supported yet; use "
                "DistributedDataParallel, which keeps whole parameters on every rank"
            )


def is_projected(
    group: dict[str, Any], composition: Composition, parameter: Tensor, name: str | None
) -> bool:
    """Whether the group's recipe applies its subspace (or activity) to a parameter.

    Args:
        group: the param group.
        composition: its parts.
        parameter: the tensor.
        name: its name, if it has one.

    Raises:
        ValueError: if the group asks for a complex tensor to be projected.
    """
    has_subspace = composition.finder is not None or composition.activity is not None
    unwanted = group["project"] is False or group.get("rank", 0) is None
    if not has_subspace or unwanted or parameter.dim() < 2 or parameter.numel() == 0:
        return False
    if not group["project"] and name is not None and not is_projected_by_name(name):
        return False
    if parameter.is_complex() and group["project"]:
        raise ValueError(
            f"parameter {name or tuple(parameter.shape)} is complex and cannot be projected: "
            "put it in a group with project=False"
        )
    return not parameter.is_complex()


def lay_out(
    group: dict[str, Any],
    composition: Composition,
    parameter: Tensor,
    name: str,
    index: int,
    projected: bool,
) -> Layout:
    """The layout of a parameter under a group's composition."""
    shape = torch.view_as_real(parameter).shape if parameter.is_complex() else parameter.shape
    natural = tuple(shape)
    if not projected:
        plain = Layout(index, name, natural, natural)
        if composition.parts_for(plain).elementwise:
            return plain
        view = matrix_view(natural, stacked=group["stacked"]) if natural else (1,)
        return Layout(index, name, natural, view)
    view = matrix_view(natural, stacked=group["stacked"])
    if composition.finder is None:
        return Layout(index, name, natural, view, projected=True)
    m, n = view[-2:]
    side = projection_side(m, n, composition.proj_type, composition.tie)
    chosen = composition.finder.form == "coordinates"
    rank = resolve_rank(m, n, side, composition.rank, coordinates=chosen)
    return Layout(index, name, natural, view, side, rank, projected=True)
