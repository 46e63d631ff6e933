"""Tables about text for the terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from subspan.train.config import DataConfig
from subspan.train.corpora import BUILTIN, DATASETS_PREFIX
from subspan.train.data import PreparedData
from subspan.train.textfiles import SUFFIXES


def listing() -> RenderableType:
    """Built-in corpora, and what else can be named."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("corpus", "what", "one document", "licence"):
        table.add_column(column, no_wrap=column == "corpus")
    for name, corpus in BUILTIN.items():
        table.add_row(name, corpus.title, corpus.document, corpus.licence)
    suffixes = ", ".join(SUFFIXES)
    table.add_row("a path", f"local files and folders ({suffixes})", "see the documentation", "—")
    table.add_row(f"{DATASETS_PREFIX}NAME", "a name for the datasets library", "one row", "—")
    return table


def statistics(config: DataConfig, data: PreparedData) -> RenderableType:
    """Sizes of a tokenised corpus."""
    tokens = len(data.train) + len(data.validation)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "training documents": f"{data.documents[0]:,}",
        "held-out documents": f"{data.documents[1]:,}",
        "characters": f"{data.characters:,}",
        "vocabulary": f"{len(data.tokenizer):,}",
        "training tokens": f"{len(data.train):,}",
        "held-out tokens": f"{len(data.validation):,}",
        "characters per token": f"{data.characters / tokens:.2f}",
        "hash": data.corpus_hash,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
