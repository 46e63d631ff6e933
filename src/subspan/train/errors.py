"""The one exception that the command line turns into one line on stderr."""

from __future__ import annotations

import errno


class JobError(Exception):
    """Bad input or a condition that the user can remedy.

    The message is one line that names the thing and the remedy.
    """


class ElsewhereError(JobError):
    """The error that stopped the process which leads a run; that process reports it."""


_DISK_FULL = "no space left on device"


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or an error that caused it, says that the disk (or quota) is full.

    Writers written in C++ or Rust (torch, safetensors) raise their own exception types, with the
    system's message in the text or an `OSError` as context.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _DISK_FULL in str(current).lower():
            return True
        current = current.__cause__ or current.__context__
    return False


def one_line(error: BaseException) -> str:
    """The message of `error` with line breaks removed, or its type when it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
