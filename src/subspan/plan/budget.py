"""Sizes of memory as text."""

from __future__ import annotations

import re

from subspan.train.errors import JobError

COUNTING = "GB = 10^9 bytes, GiB = 2^30 in brackets; bases (projectors) are counted as state"

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "24GB" (10^9), "22.5 GiB" (2^30) and the like.

    Raises:
        JobError: it is no positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not found or found[2] not in _UNITS or size < 1:
        raise JobError(f"--budget {text!r} is no size; write 24GB (10^9 bytes) or 22GiB (2^30)")
    return int(size)


def gigabytes(size: int) -> str:
    """ "13.477 (12.551)": GB, and GiB in brackets."""
    return f"{size / 1e9:.3f} ({size / 2**30:.3f})"


def reduction(size: int, baseline: int) -> str:
    """By how much a size differs from a baseline, "-65.1 %"."""
    return f"{100 * (size / baseline - 1):+.1f} %"
