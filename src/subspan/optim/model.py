"""An optimizer for a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from subspan.optim.engine import SubspaceOptimizer
from subspan.optim.registry import build, lookup
from subspan.optim.selection import param_groups_for_model


def for_model(
    model: nn.Module,
    method: str = "galore",
    *,
    project: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    plain_lr: float | None = None,
    **options: Any,
) -> SubspaceOptimizer:
    """The optimizer of a whole model: block matrices projected, everything else plain.

        optimizer = subspan.optim.for_model(model, "galore", lr=0.01, rank=128)

    Args:
        model: any module; see `param_groups_for_model` for which of its weights are projected.
        method: name of a registered recipe.
        project: regular expressions of the names to project instead of the default choice.
        exclude: regular expressions of names not to project.
        plain_lr: learning rate of what is not projected; the same `lr` if None.
        options: hyper-parameters of the recipe.

    Raises:
        ValueError: for an unknown method, a value that is not allowed, or a pattern that matches
            nothing.
        TypeError: for an option that the recipe does not have.
    """
    recipe = lookup(method)
    recipe.check_options(options)
    whole = recipe.compose({**recipe.defaults, **options}).takes_all
    groups = param_groups_for_model(model, project=project, exclude=exclude, whole=whole)
    for group in groups:
        if plain_lr is not None and not group["project"]:
            group["lr"] = plain_lr
    return build(method, groups, **options)
