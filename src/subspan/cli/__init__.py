"""The command line: reads arguments, calls the library, shows what comes back.

One module per command. Imports that take time stand inside the commands, so that `--help` and
`--version` are instant.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from subspan import __version__
from subspan.cli import compare, data, methods, plan, report, train
from subspan.cli.common import INTERRUPTED, fail

app = typer.Typer(
    name="subspan",
    help="Train large neural networks inside low-rank subspaces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train large neural networks inside low-rank subspaces."""
    if version:
        print(f"subspan {__version__}")
        raise typer.Exit


app.command()(train.train)
app.command()(compare.compare)
app.command()(plan.plan)
app.command()(report.report)
app.command()(methods.methods)
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and a non-zero status."""
    from subspan.train.distributed import rank, world_size
    from subspan.train.errors import ElsewhereError, JobError, one_line

    # A request to end is handled like Ctrl-C, so that the process of an arm ends with its parent.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # Some versions of typer turn the exception into a status.
            raise KeyboardInterrupt
    except ElsewhereError:
        sys.exit(2)
    except JobError as error:
        who = f"process {rank()}: " if rank() else ""
        fail(who + one_line(error), status=2)
    except (KeyboardInterrupt, typer.Abort):
        why = "interrupted" if world_size() == 1 else "ended from outside (see torchrun's report)"
        fail(f"{why}; the same command goes on from the last checkpoint", status=INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "subspan").startswith("subspan"):
            raise
        fail(f"package {error.name} is missing; pip install 'subspan[train]'", status=2)
    except Exception as error:
        # Usage errors of the argument parser, which typer brings along under a private name.
        if not hasattr(error, "format_message"):
            raise
        fail(f"{one_line(Exception(error.format_message()))} (see --help)", status=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(status if isinstance(status, int) else 0)
