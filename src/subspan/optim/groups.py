"""Param groups: which of their tensors are projected, and how each tensor is laid out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan.optim.bucket import is_quantised
from subspan.optim.composition import Composition
from subspan.optim.resting import is_trainable
from subspan.optim.selection import is_projected_by_name
from subspan.subspaces.layout import (
    Layout,
    matrix_view,
    mode_ranks,
    projection_side,
    resolve_rank,
)
from subspan.subspaces.ranks import EnergyRank


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
    claimed = composition.inner.claims(name)
    if claimed is not None:
        return claimed and parameter.numel() > 0 and not parameter.is_complex()
    unwanted = group["project"] is False or group.get("rank", 0) is None
    if not composition.selective or unwanted or parameter.numel() == 0:
        return False
    if composition.takes_all and not parameter.is_complex():
        return is_trainable(parameter)
    if parameter.dim() < 2 or (
        parameter.dim() > 2
        and composition.tensors is not None
        and parameter.numel() <= composition.tensors_above
    ):
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
    plain = Layout(index, name, natural, natural, projected=projected)
    parts = composition.parts_for(plain)
    if parts.elementwise:
        return plain
    if parts.proj_type == "tucker" and projected:
        assert not isinstance(parts.rank, EnergyRank)
        ranks = mode_ranks(natural, parts.rank, parts.modes)
        return replace(plain, side="modes", mode_ranks=ranks)
    view = matrix_view(natural, stacked=group["stacked"]) if natural else (1,)
    if not projected or parts.finder is None:
        return replace(plain, view=view)
    m, n = view[-2:]
    side = projection_side(m, n, parts.proj_type, parts.tie)
    chosen = parts.finder.form == "coordinates"
    if isinstance(parts.rank, EnergyRank):
        rank = min(m, n, parts.rank.smallest)  # until the first gradient
    else:
        rank = resolve_rank(m, n, side, parts.rank, coordinates=chosen)
    return replace(plain, view=view, side=side, rank=rank, complement=parts.complement)


def check_exactness(composition: Composition, layout: Layout, parameter: Tensor) -> None:
    """Refuse weights held in int8 where an optimizer needs them exactly.

    Raises:
        ValueError: naming the parameter and the part.
    """
    parts = composition.parts_for(layout)
    parts.inner.check(layout)
    if is_quantised(parameter) and parts.inner.needs_exact_weights:
        raise ValueError(
            f"parameter {layout.name!r} is held in int8, but {type(parts.inner).__name__} needs "
            "exact weights: use `subspan.layers.dequantise_linear`, or another method"
        )
