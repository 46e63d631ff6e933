"""Codebooks: the values that codes of a few bits stand for, and tables that find the nearest one.

The dynamic map has one run of evenly spaced values per decade. With b bits, b - 1 decades and
d = 0 .. b - 2,

    10^(d - b + 2) * midpoints of [0.1, 1] cut into 2^d parts, with both signs, 0 and 1   (signed)
    10^(d - b + 2) * midpoints of [0.1, 1] cut into 2^(d + 1) parts, 0 and 1              (unsigned)

so large values are resolved finely and small ones down to 10^(1 - b). It is from "8-bit Optimizers
via Block-wise Quantization" (Dettmers et al., 2021, arXiv:2110.02861). Linear maps without zero for
second moments are from "Memory Efficient Optimizers with 4-bit States" (Li et al., 2023,
arXiv:2309.01507).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_CELL = 1 << 16
"""How many float32 numbers share the upper half of their bit pattern, and how many halves."""


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")


def dynamic_codebook(signed: bool, bits: int = 8) -> Tensor:
    """The dynamic map (see above). With 8 bits it is bitsandbytes's `create_dynamic_map`.

    -1 is not in it: a block whose largest magnitude is negative is read back with that value too
    small, by 0.7 % with 8 bits, and would be given a smaller scale if quantised again. 0 is in the
    unsigned map, too: a second moment below 1.6e-7 of the block's largest is read back as 0.

    Args:
        signed: with negative values, for first moments; else for second moments.
        bits: 2 to 8.

    Returns:
        (2**bits,), float32, strictly increasing, from 0 (unsigned) or just above -1 (signed) to 1.

    Raises:
        ValueError: `bits` is out of range.

    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, arXiv:2110.02861.
    """
    _check_bits(bits)
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(bits - 1):
        # float32 throughout: the last bit of the published map comes from this rounding.
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        run = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - bits + 2)
        values += [run, -run] if signed else [run]
    return torch.cat(values).sort().values


def linear_codebook(signed: bool, bits: int = 8) -> Tensor:
    """Evenly spaced values, with zero (twice) if signed, without it if not.

    Signed: k / K and -k / K for k = 0 .. K, K = 2^(bits - 1) - 1.
    Unsigned: (c + 1) / 2^bits for code c. A second moment is divided by, so it must not become 0.

    Args:
        signed: with negative values.
        bits: 2 to 8.

    Returns:
        (2**bits,), float32, increasing.

    Raises:
        ValueError: `bits` is out of range.

    Li et al., "Memory Efficient Optimizers with 4-bit States", 2023, arXiv:2309.01507.
    """
    _check_bits(bits)
    if not signed:
        return torch.arange(1.0, 2**bits + 1) / 2**bits
    top = 2 ** (bits - 1) - 1
    return torch.cat([torch.arange(-top, 1.0), torch.arange(top + 1.0)]) / top


def _remembered(build: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keep the table of each codebook tensor for as long as that tensor lives unchanged."""
    tables = WeakTensorKeyDictionary()

    @wraps(build)
    def find(codebook: Tensor) -> Tensor:
        version = None if codebook.is_inference() else codebook._version
        kept = tables.get(codebook)
        if kept is None or kept[0] != version:
            with torch.no_grad():
                kept = tables[codebook] = (version, build(codebook).to(codebook.device))
        return kept[1]

    return find


def _values(codebook: Tensor) -> Tensor:
    """The entries as float64 on the CPU.

    Raises:
        ValueError: they are not finite and sorted.
    """
    values = codebook.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()) or bool((values.diff() < 0).any()):
        raise ValueError("codebook must hold finite values in increasing order")
    return values


def _nearest(x: Tensor, middles: Tensor) -> Tensor:
    """Codes of the nearest entries, the upper one in the middle between two."""
    return torch.searchsorted(middles, x, right=True)


@_remembered
def nearest_table(codebook: Tensor) -> Tensor:
    """For the upper half h of a float32 bit pattern k: what makes |(k + table[h]) >> 16| its code.

    A cell of equal upper halves holds at most one middle between two entries, so its codes differ
    by one at most, and a carry out of the lower half adds that one. Patterns of negative numbers
    grow with their magnitude, so there the sum is minus the code. Infinities and NaN get the code
    of the entry nearest to zero.

    Args:
        codebook: (at most 256,), on any device.

    Returns:
        (65536,), int32, on the device of the codebook; the sum is meant to wrap around.

    Raises:
        ValueError: the codebook is not finite and sorted, or two middles share a cell.
    """
    values = _values(codebook)
    middles = (values[1:] + values[:-1]) / 2
    upper = torch.arange(_CELL)
    negative = upper >= _CELL // 2
    start = (upper << 16) - (negative.long() << 32)  # first pattern of a cell, as signed 32 bits

    def codes(patterns: Tensor) -> Tensor:
        return _nearest(patterns.to(torch.int32).view(torch.float32).double(), middles)

    first, last = codes(start), codes(start + _CELL - 1)
    not_finite = (upper & 0x7F80) == 0x7F80
    first[not_finite] = last[not_finite] = values.abs().argmin()
    if bool(((first - last).abs() > 1).any()):
        raise ValueError(
            "codebook entries must differ by at least 1/128 of the power of two below them"
        )
    # Where the codes of a cell differ, the first float32 behind the middle, away from zero.
    middle = torch.cat([middles, middles[-1:]])[torch.minimum(first, last)]
    number = middle.float()
    above = torch.nextafter(number, torch.tensor(torch.inf))
    below = torch.nextafter(number, torch.tensor(-torch.inf))
    behind = torch.where(
        negative,
        torch.where(number.double() < middle, number, below),
        torch.where(number.double() < middle, above, number),
    )
    carry = _CELL - (behind.view(torch.int32).long() & (_CELL - 1))
    carry[first == last] = 0
    total = (torch.where(negative, -first, first) << 16) + carry - start
    return ((total + 2**31) % 2**32 - 2**31).to(torch.int32)


@_remembered
def grid_table(codebook: Tensor) -> Tensor:
    """Codes of the 65 536 even grid values 2 i / 65 535 - 1.

    Args:
        codebook: (at most 256,), on any device.

    Returns:
        (65536,), uint8, on the device of the codebook.

    Raises:
        ValueError: the codebook is not finite and sorted.
    """
    values = _values(codebook)
    # One middle is so close to a grid value that bitsandbytes's rounding to float32 decides.
    grid = torch.arange(_CELL, dtype=torch.float32) / (_CELL - 1) * 2 - 1
    return _nearest(grid.double(), (values[1:] + values[:-1]) / 2).to(torch.uint8)


@_remembered
def pair_table(codebook: Tensor) -> Tensor:
    """The two float32 entries behind each byte of two 4-bit codes, low nibble first.

    Args:
        codebook: (at most 16,), on any device; codes without an entry stand for 0.

    Returns:
        (256,), both entries in the bits of one int64: one look-up moves two. On the device of the
        codebook.
    """
    byte = torch.arange(256)
    entries = torch.zeros(16)
    entries[: codebook.numel()] = codebook.detach().float().cpu()
    return entries[torch.stack([byte & 15, byte >> 4], dim=-1)].view(torch.int64).view(-1)
