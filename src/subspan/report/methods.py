"""Tables of the registered methods for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def listing() -> RenderableType:
    """All methods with title and paper."""
    from subspan.optim import methods

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "method", "paper"):
        table.add_column(column, no_wrap=column == "name")
    for name, recipe in sorted(methods().items()):
        table.add_row(Text(name, style="bold"), Text(recipe.title), Text(recipe.paper))
    return table


def description(name: str) -> RenderableType:
    """One method: what it does, paper, defaults, the parts it is made of, evidence.

    Raises:
        ValueError: unknown name.
    """
    from subspan.optim import lookup

    recipe = lookup(name)
    composition = recipe.compose(recipe.defaults)
    parts = {
        field.name: value
        for field in fields(composition)
        if (value := getattr(composition, field.name)) is not None
    }
    defaults = {key: value for key, value in recipe.defaults.items() if key != "method"}
    return Group(
        Text(f"{recipe.title} ({recipe.name})", style="bold"),
        Text(recipe.summary),
        Text(recipe.paper, style="dim"),
        _pairs("defaults", defaults),
        _pairs("parts", parts),
        Text(f"\nstate elements of an m x n matrix, m <= n: {recipe.memory}"),
        _items("evidence", recipe.evidence),
        _items("departures from the authors' code", recipe.departures),
    )


def _pairs(title: str, values: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(Text(f"  {key}"), Text(str(value)))
    return Group(Text(f"\n{title}", style="bold"), table)


def _items(title: str, lines: Sequence[str]) -> RenderableType:
    if not lines:
        return Text()
    return Group(Text(f"\n{title}", style="bold"), *(Text(f"  {line}") for line in lines))
