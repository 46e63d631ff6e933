"""Where text comes from: built-in corpora, local files and folders, and `datasets` names.

Every corpus is a list of documents in a deterministic order. Built-in corpora need no download:
they are read from the installed Python and its packages, so they differ between environments; the
run folder keeps the hash of what was read.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

from subspan.train.docstrings import collect
from subspan.train.errors import JobError
from subspan.train.textfiles import read_dataset, read_file, text_files

DATASETS_PREFIX = "datasets:"

# Part of the cache key: raise it when the built-in corpora are read differently.
_READER = 1

# Tests and bundled tools hold few docstrings and much repetition.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages"}


@dataclass(frozen=True)
class Builtin:
    """A corpus that is always there."""

    title: str
    licence: str
    document: str
    read: Callable[[list[str]], list[str]]


def _python_files(root: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        files += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    return files


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def package_root(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        JobError: there is no such package, or it has no folder.
    """
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"data.packages: {name!r} is not an installed package; install or remove it")
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings(packages: list[str]) -> list[str]:
    roots = [_standard_library(), *map(package_root, packages)]
    return collect([path for root in roots for path in _python_files(root)])


def _topics(packages: list[str]) -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _source(packages: list[str]) -> list[str]:
    files = _python_files(_standard_library())
    return [path.read_bytes().decode("utf-8", errors="ignore") for path in files]


BUILTIN = {
    "docstrings": Builtin(
        "docstrings of the standard library and of data.packages",
        "PSF; each package's own",
        "all docstrings of one source file",
        _docstrings,
    ),
    "pydoc-topics": Builtin(
        "the Python language reference as plain prose", "PSF", "one topic", _topics
    ),
    "stdlib-source": Builtin(
        "source code of the standard library", "PSF", "one source file", _source
    ),
}


def check_corpus(corpus: str | list[str], packages: list[str]) -> None:
    """Refuse what `read_corpus` could not read, without reading text.

    Raises:
        JobError: unknown corpus, missing file or package.
    """
    if isinstance(corpus, list) or "/" in corpus or Path(corpus).exists() or Path(corpus).suffix:
        if not str(corpus).startswith(DATASETS_PREFIX):
            text_files([corpus] if isinstance(corpus, str) else corpus)
    elif corpus not in BUILTIN and not corpus.startswith(DATASETS_PREFIX):
        raise JobError(
            f"unknown corpus {corpus!r}: not one of {', '.join(BUILTIN)}, not a file or folder; "
            f"a data set is named {DATASETS_PREFIX}NAME"
        )
    elif corpus == "docstrings":
        for name in packages:
            package_root(name)


def read_corpus(
    corpus: str | list[str], *, packages: list[str] | None = None, text_field: str = "text"
) -> list[str]:
    """Documents of a corpus: none empty, each once, in a deterministic order.

    Args:
        corpus: built-in name, `datasets:NAME[:CONFIGURATION]`, a path, or a list of paths.
        packages: packages that `docstrings` reads besides the standard library.
        text_field: field of .jsonl and .parquet files and data sets that holds the text.

    Raises:
        JobError: unknown corpus, missing or unreadable file, no text in it.
    """
    check_corpus(corpus, packages or [])
    if isinstance(corpus, str) and corpus in BUILTIN:
        documents: Iterable[str] = BUILTIN[corpus].read(packages or [])
    elif isinstance(corpus, str) and corpus.startswith(DATASETS_PREFIX):
        documents = read_dataset(corpus.removeprefix(DATASETS_PREFIX), text_field)
    else:
        files = text_files([corpus] if isinstance(corpus, str) else corpus)
        documents = (text for path in files for text in read_file(path, text_field))
    # Identical documents would put the same text into training and validation.
    unique = list(dict.fromkeys(text for text in documents if text.strip()))
    if not unique:
        name = corpus if isinstance(corpus, str) else ", ".join(corpus)
        raise JobError(f"corpus {name} holds no text; give files that are not empty")
    return unique


def source_key(corpus: str | list[str], packages: list[str], text_field: str) -> str | None:
    """Hash of what a corpus is read from, or none when only reading it tells.

    Built-in corpora are named by versions and by path, size and time of every source file, so
    that the seconds of parsing them are spent once.
    """
    if not isinstance(corpus, str) or corpus not in BUILTIN:
        return None
    roots = [_standard_library()]
    if corpus == "docstrings":
        roots += map(package_root, packages)
    digest = hashlib.sha256(f"{corpus} {python_version()} {_READER}".encode())
    for root in roots:
        for path in _python_files(root):
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
