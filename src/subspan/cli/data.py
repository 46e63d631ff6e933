"""`subspan data`."""

from __future__ import annotations

from typing import Annotated

import typer

from subspan.cli.common import Setting, console
from subspan.train import flags

app = typer.Typer(help="Built-in corpora and statistics of any corpus.", no_args_is_help=True)


@app.command("list")
def data_list() -> None:
    """List the built-in corpora."""
    from subspan.report.corpora import listing

    console().print(listing())


@app.command("stats")
def data_stats(
    corpus: Annotated[list[str], typer.Argument(help="Corpus as in `subspan train --corpus`.")],
    vocab_size: flags.Vocabulary = None,
    tokenizer: flags.Tokenizer = None,
    setting: Setting = None,
) -> None:
    """Count documents, characters and tokens of a corpus."""
    from subspan.report.corpora import statistics
    from subspan.train.data import prepare_data
    from subspan.train.overrides import fields, train_config

    given = {"corpus": corpus, "vocab_size": vocab_size, "tokenizer": tokenizer}
    resolved = train_config(None, fields(given, setting or ())).data
    console().print(statistics(resolved, prepare_data(resolved)))
