"""What several commands share: the flags --config, --set and --quiet, the console, the exit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file.")]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any other field, such as data.text_field=body."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def console(quiet: bool = False) -> Console:
    """Console on standard output."""
    from rich.console import Console

    return Console(quiet=quiet)


def fail(message: str, status: int) -> NoReturn:
    """End with one line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
