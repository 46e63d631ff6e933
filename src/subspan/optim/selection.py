"""Which parameters are projected, and the param groups of a whole model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from subspan.optim.resting import is_trainable

# Token and position embeddings, output heads and norms, by the names in common architectures.
_KEPT_WHOLE = re.compile(
    r"(^|[._])(embed\w*|embeddings?|wte|wpe|lm_head|head|heads|classifier|score|output_projection"
    r"|\w*norm\w*|ln(_\w+|\d+)?|bn\d*|pos_emb\w*)(?=[._]|$)"
)


def is_projected_by_name(name: str) -> bool:
    """Whether a weight of that name belongs to the blocks.

    Those of embeddings, output heads and norms do not.
    """
    return _KEPT_WHOLE.search(name) is None


def param_groups_for_model(
    model: nn.Module,
    project: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    *,
    whole: bool = False,
) -> list[dict[str, Any]]:
    """Param groups: the matrices to project, and everything else with `project=False`.

    Groups that would be empty are left out.

    Projected are the weights of linear and convolution layers (and attention's packed input
    projections) except embeddings, output heads (by name, or tied to an embedding) and norms.
    Three-dimensional weights that belong to neither kind of layer are taken for stacked experts and
    projected matrix by matrix, in a group of their own. Frozen parameters are left out; a tied
    weight appears once.

    Args:
        model: any module.
        project: regular expressions; if given, exactly the weights of two or more dimensions whose
            name one of them matches (anywhere) are projected.
        exclude: regular expressions; weights whose name one of them matches are not projected.
        whole: for methods that take all of a model: one group of all its parameters, vectors,
            embeddings, heads and norms included, except what `project` or `exclude` leave out.

    Raises:
        ValueError: if a pattern is no regular expression, matches no parameter, or nothing can be
            trained.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if is_trainable(p)]
    if not trainable:
        raise ValueError("model has no parameter with requires_grad=True: nothing can be trained")
    include = _patterns("project", project, trainable)
    exclude_patterns = _patterns("exclude", exclude, trainable)
    kinds = _layer_kinds(model)
    matrices, stacked, others = [], [], []
    for name, parameter in trainable:
        wanted = (whole or parameter.dim() >= 2) and not parameter.is_complex()
        if include is not None:
            wanted = wanted and any(pattern.search(name) for pattern in include)
        elif not whole:
            kind = kinds.get(id(parameter), "expert" if parameter.dim() == 3 else "other")
            wanted = wanted and kind in ("layer", "expert") and is_projected_by_name(name)
        if exclude_patterns is not None and any(
            pattern.search(name) for pattern in exclude_patterns
        ):
            wanted = False
        if not wanted:
            others.append((name, parameter))
        elif not whole and parameter.dim() == 3 and id(parameter) not in kinds:
            stacked.append((name, parameter))
        else:
            matrices.append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": matrices, "project": True},
        {"params": stacked, "project": True, "stacked": True},
        {"params": others, "project": False},
    ]
    return [group for group in groups if group["params"]]


def _layer_kinds(model: nn.Module) -> dict[int, str]:
    """id of parameter -> "layer" or "embedding".

    An embedding wins over a layer that shares its weight.
    """
    # transformers' Conv1D is a linear layer with a transposed weight; it is recognised by name,
    # which avoids the import.
    kinds: dict[int, str] = {}
    for module in model.modules():
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear or convolution:
            kinds.setdefault(id(module.weight), "layer")
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            kinds.setdefault(id(module.in_proj_weight), "layer")
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            kinds[id(module.weight)] = "embedding"
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            kinds[id(module.weight)] = "embedding"
    return kinds


def _patterns(
    argument: str, patterns: Sequence[str] | str | None, named: Sequence[tuple[str, torch.Tensor]]
) -> list[re.Pattern[str]] | None:
    if patterns is None:
        return None
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"{argument}={pattern!r} is not a regular expression: {error}"
            ) from error
        if not any(compiled[-1].search(name) for name, _ in named):
            raise ValueError(
                f"{argument}={pattern!r} matches no trainable parameter; names look like "
                f"{named[0][0]!r}"
            )
    return compiled
