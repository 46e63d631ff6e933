"""Replacing the linear layers of a model by layers of another kind, in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

Patterns = Sequence[str] | str | None
Kind = TypeVar("Kind", bound=nn.Linear)


def replace_linear(
    model: nn.Module,
    kind: type[Kind],
    build: Callable[[Kind], nn.Linear],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    blocks_only: bool = True,
) -> nn.Module:
    """Replace every chosen layer of exactly the type `kind` by what `build` makes of it.

    One layer is converted at a time, so its old weight can be freed before the next. Chosen layers
    that share a weight share the new one; a layer that shares its weight with a module that is not
    chosen (a tied embedding) is left alone. Forward hooks of the replaced layers are lost.

    Args:
        model: changed in place.
        kind: subclasses of it are left alone: their forward may differ.
        build: from the old layer to the new one.
        include: regular expressions; exactly the layers whose name one of them matches (anywhere)
            are chosen. All when None.
        exclude: regular expressions; layers whose name one of them matches are not chosen.
        blocks_only: without `include`, leave out heads, by `subspan.optim.selection`.

    Returns:
        `model`, or its replacement if it is itself such a layer.

    Raises:
        ValueError: a pattern is no regular expression or matches no layer of the kind.
    """
    for names in _chosen(model, kind, include, exclude, blocks_only):
        made: list[tuple[Kind, nn.Linear]] = []
        for name in names:
            old = model.get_submodule(name)
            new = next((new for known, new in made if known is old), None)
            if new is None:
                assert isinstance(old, kind)
                new = build(old)
                if made:
                    new.weight = made[0][1].weight
                made.append((old, new))
            if not name:
                return new
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
    return model


def _chosen(
    model: nn.Module,
    kind: type[nn.Linear],
    include: Patterns,
    exclude: Patterns,
    blocks_only: bool,
) -> list[list[str]]:
    """Names of the layers to replace; those that share a weight stand together."""
    modules = list(model.named_modules(remove_duplicate=False))
    named = [name for name, module in modules if type(module) is kind]
    included = _compiled("include", include, named)
    excluded = _compiled("exclude", exclude, named)
    groups: dict[int, list[str]] = {}
    owned: set[int] = set()
    for name, module in modules:
        if included:
            wanted = any(pattern.search(name) for pattern in included)
        else:
            wanted = not blocks_only or _in_a_block(name)
        wanted = wanted and not any(pattern.search(name) for pattern in excluded)
        if wanted and type(module) is kind:
            groups.setdefault(id(module.weight), []).append(name)
        else:
            owned.update(id(parameter) for parameter in module._parameters.values())
    return [names for weight, names in groups.items() if weight not in owned]


def _in_a_block(name: str) -> bool:
    # The optimizers stand on the same floor; they are only needed here and now.
    from subspan.optim.selection import is_projected_by_name

    return is_projected_by_name(name)


def _compiled(argument: str, patterns: Patterns, names: list[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"{argument}={pattern!r} is not a regular expression: {error}"
            ) from error
        if not any(compiled[-1].search(name) for name in names):
            example = f"names look like {names[0]!r}" if names else "the model has none"
            raise ValueError(f"{argument}={pattern!r} matches no linear layer; {example}")
    return compiled
