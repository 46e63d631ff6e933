"""Docstrings of source files, without importing them.

Parsing is pure Python and takes many seconds for large packages, so `collect` spreads the files
over processes: each runs this module with a list of files on its standard input. Plain processes
rather than a pool, because a pool would import the caller's script again or fork its threads.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_MINIMUM_CHARACTERS = 20

_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


def _definitions(tree: ast.AST) -> Iterator[ast.AST]:
    """Modules, classes and functions in source order, at any depth of statements."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        inside = [child for field in _BLOCKS for child in getattr(node, field, None) or ()]
        stack += reversed(inside)


def file_docstrings(path: str | Path) -> str | None:
    """All docstrings of one source file as one document; none when it has none.

    A file that this Python cannot parse (a template, another version's syntax) has none.
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return None
    parts = []
    for node in _definitions(tree):
        body = getattr(node, "body", None)
        first = body[0].value if body and isinstance(body[0], ast.Expr) else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            text = inspect.cleandoc(first.value)
            if len(text) >= _MINIMUM_CHARACTERS:
                parts.append(text)
    return "\n\n".join(parts) or None


def collect(files: list[Path]) -> list[str]:
    """Documents of `files` in their order, one for each file that has docstrings."""
    workers = max(1, min(8, os.cpu_count() or 1, len(files) // 50))
    if workers == 1:
        return [text for text in map(file_docstrings, files) if text]
    # A worker needs nothing but this file; running it by path skips the import of the package.
    command = [sys.executable, "-W", "ignore", "-I", __file__]
    processes = []
    for worker in range(workers):
        share = json.dumps([str(path) for path in files[worker::workers]])
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(share.encode())
        process.stdin.close()
        processes.append(process)
    found: list[str | None] = [None] * len(files)
    for worker, process in enumerate(processes):
        assert process.stdout is not None
        output = process.stdout.read()
        if process.wait() != 0:
            raise RuntimeError(f"reading docstrings failed with exit status {process.returncode}")
        found[worker::workers] = json.loads(output)
    return [text for text in found if text]


if __name__ == "__main__":
    json.dump([file_docstrings(path) for path in json.load(sys.stdin)], sys.stdout)
