"""Documents of local files: .txt, .jsonl and .parquet, and of the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from subspan.train.errors import JobError, one_line

SUFFIXES = (".txt", ".jsonl", ".parquet")

SECTION_CHARACTERS = 8192
"""A .txt file is cut into documents of at least this size, at blank lines where there are any."""


def text_files(paths: list[str]) -> list[Path]:
    """Files that `paths` (files and folders) name, those of a folder in sorted order.

    Raises:
        JobError: a path does not exist, or nothing readable is in it.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise JobError(f"folder {name} holds no {', '.join(SUFFIXES)} file")
            files += inside
        elif not path.exists():
            raise JobError(f"text file {name} does not exist; check data.corpus")
        elif path.suffix not in SUFFIXES:
            raise JobError(f"cannot read {name}: text files end in {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise JobError("data.corpus is an empty list; name at least one file")
    return files


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """Documents of one file.

    Raises:
        JobError: the file cannot be read, or has no field `text_field`.
    """
    try:
        if path.suffix == ".txt":
            yield from sections(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_field)
        else:
            yield from _read_parquet(path, text_field)
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror or one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"cannot read {path}: not UTF-8 text (byte {error.start})") from None


def sections(text: str) -> Iterator[str]:
    """Cut a text into documents without losing a character.

    A document ends at the first blank line after `SECTION_CHARACTERS` characters, or, when none
    comes, at the first line end after twice as many.
    """
    section: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        section.append(line)
        length += len(line)
        blank = not line.strip()
        if length >= 2 * SECTION_CHARACTERS or (blank and length >= SECTION_CHARACTERS):
            yield "".join(section)
            section, length = [], 0
    if section:
        yield "".join(section)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise JobError(f"cannot read {path}: line {number}: {error.msg}") from None
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                raise JobError(
                    f"cannot read {path}: line {number} has no text field {text_field!r}; "
                    "set data.text_field"
                )
            yield record[text_field]


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if text_field not in names:
                raise JobError(
                    f"cannot read {path}: no column {text_field!r} "
                    f"(columns: {', '.join(names)}); set data.text_field"
                )
            for batch in parquet.iter_batches(columns=[text_field]):
                yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise JobError(f"cannot read {path}: {one_line(error)}") from None


def read_dataset(name: str, text_field: str) -> Iterator[str]:
    """Training documents of `NAME` or `NAME:CONFIGURATION` of the `datasets` library.

    Raises:
        JobError: it cannot be loaded, or has no field `text_field`.
    """
    from datasets import load_dataset

    path, _, configuration = name.partition(":")
    try:
        rows = load_dataset(path, configuration or None, split="train")
    except Exception as error:  # The library has no common error type.
        raise JobError(f"cannot load data set {name!r}: {one_line(error)}") from None
    if text_field not in rows.column_names:
        raise JobError(
            f"data set {name!r} has no field {text_field!r} "
            f"(fields: {', '.join(rows.column_names)}); set data.text_field"
        )
    for row in rows:
        yield str(row[text_field])
