"""`subspan methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from subspan.cli.common import console


def methods(
    name: Annotated[str | None, typer.Argument(help="Method to describe.")] = None,
) -> None:
    """List the methods, or describe one: paper, defaults, parts."""
    from subspan.report.methods import description, listing
    from subspan.train.job import check_method

    shown = listing() if name is None else description(check_method(name, {}))
    console().print(shown)
