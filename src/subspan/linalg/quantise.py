"""Blockwise quantisation with a codebook, and the packing of two 4-bit codes into a byte.

A tensor is taken flat in row-major order, in blocks of B values (the last one may be shorter):

    scale = max |x| of the block,   code = the codebook's entry nearest to x / scale,
    x is read back as scale * codebook[code].

From "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2021, arXiv:2110.02861) and,
with 4 bits, "Memory Efficient Optimizers with 4-bit States" (Li et al., 2023, arXiv:2309.01507).
bitsandbytes's CPU kernel (0.50) rounds x / scale to one of 65 536 even steps from -1 to 1 first, of
which none is 0: it turns what is smaller than about 2e-5 into the same few codes, zero included.
`grid=True` is that kernel, code for code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .codebooks import grid_table, nearest_table, pair_table

_PIECE = {"cpu": 1 << 17, "other": 1 << 22}
"""Elements in work at once: cache-sized on the CPU, few kernels elsewhere."""


@torch.no_grad()
def quantise_blocks(
    x: Tensor,
    codebook: Tensor,
    block: int = 256,
    *,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    packed: bool = False,
    grid: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x`; the mathematics is at the top of this module.

    Computed in float32. In the middle between two entries the upper one is taken. A block of zeros
    is read back as zeros. A value that is not finite makes its block decode to values that are not
    finite. The first use of a codebook tensor builds a table of 256 KiB (64 KiB for the grid), kept
    while that tensor lives: share one tensor among all states.

    Args:
        x: any shape and floating dtype; not changed. One that is not contiguous is copied.
        codebook: float32 (at most 256,), or (at most 16,) if packed; finite and increasing.
        block: values that share a scale.
        codes: uint8, contiguous, of the size below, any shape: written and returned.
        scale: float32, likewise.
        packed: two codes per byte, as by `pack_nibbles`; the block must be even.
        grid: round x / scale to bitsandbytes's grid first (see above).

    Returns:
        codes (x.numel(),), or (ceil(x.numel() / 2),) if packed, uint8;
        scale (ceil(x.numel() / block),), float32.

    Raises:
        TypeError: `x`, `codebook`, `codes` or `scale` is of a wrong dtype.
        ValueError: `block` is out of range; the codebook is too large, not finite and increasing,
            or has entries too close to one another; `codes` or `scale` is of a wrong size.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    _check_codebook(codebook, block, packed)
    count = x.numel()
    codes = _target("codes", codes, _code_count(count, packed), torch.uint8, x.device)
    scale = _target("scale", scale, -(-count // block), torch.float32, x.device)
    values, flat_codes, flat_scale = x.detach().reshape(-1), codes.view(-1), scale.view(-1)
    table = grid_table(codebook) if grid else nearest_table(codebook)
    step = _step(block, x.device)
    size = min(count, step)
    ratio = torch.empty(size, dtype=torch.float32, device=x.device)
    key = torch.empty(size, dtype=torch.int32, device=x.device)
    found = torch.empty(size, dtype=table.dtype, device=x.device)
    for start in range(0, count, step):
        part = values[start : start + step].float()
        y, k, c = (work[: part.numel()] for work in (ratio, key, found))
        direct = grid and not packed
        c = flat_codes[start : start + step] if direct else c
        torch.abs(part, out=y)
        for top, magnitudes, given in _by_block(block, flat_scale[start // block :], y, part):
            torch.amax(magnitudes, 1, out=top)
            # A block of zeros is divided by one. A product with 1 / scale could overflow.
            torch.div(given, (top + (top == 0)).unsqueeze(1), out=magnitudes)
        (_grid_codes if grid else _nearest_codes)(y, table, k, c)
        if direct:
            continue
        if packed:
            flat_codes[start // 2 :][: (c.numel() + 1) // 2].copy_(pack_nibbles(c.to(torch.uint8)))
        else:
            flat_codes[start : start + step].copy_(c)
    return codes, scale


def _nearest_codes(y: Tensor, table: Tensor, key: Tensor, codes: Tensor) -> None:
    """Exactly nearest entries: one look-up by the upper half of the bits decides."""
    bits = y.view(torch.int32)
    torch.bitwise_right_shift(bits, 16, out=key).bitwise_and_(0xFFFF)
    torch.index_select(table, 0, key, out=codes)
    codes.add_(bits).bitwise_right_shift_(16).abs_()


def _grid_codes(y: Tensor, table: Tensor, key: Tensor, codes: Tensor) -> None:
    """Entries nearest to y rounded to 2 i / 65 535 - 1, i = floor((y + 1) 32 767.5 + 0.5)."""
    y.add_(1).mul_(32767.5).add_(0.5)
    # What a NaN becomes depends on the machine.
    torch.index_select(table, 0, key.copy_(y).clamp_(0, 0xFFFF), out=codes)


@torch.no_grad()
def dequantise_blocks(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    block: int = 256,
    *,
    count: int | None = None,
    packed: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values scale * codebook[code] of what `quantise_blocks` returned.

    Computed in float32, rounded once to the dtype of the result.

    Args:
        codes: uint8, contiguous, any shape.
        scale: float32, contiguous, one per block.
        codebook, block, packed: as it was quantised with.
        count: how many values, if packed and odd; else known from `out` or `codes`.
        out: contiguous, any shape and floating dtype: written and returned.
        dtype: of the result without `out`.

    Returns:
        (count,), or `out`.

    Raises:
        TypeError: a tensor is of a wrong dtype.
        ValueError: `block` is out of range, the codebook is too large, or sizes do not fit.
    """
    _check_codebook(codebook, block, packed)
    if count is None:
        count = out.numel() if out is not None else codes.numel() * (2 if packed else 1)
    _target("codes", codes, _code_count(count, packed), torch.uint8, codes.device)
    _target("scale", scale, -(-count // block), torch.float32, codes.device)
    out = _target("out", out, count, dtype if out is None else out.dtype, codes.device)
    flat_codes, flat_scale, values = codes.view(-1), scale.view(-1), out.view(-1)
    table = pair_table(codebook) if packed else codebook
    step = _step(block, codes.device)
    size = _code_count(min(count, step), packed)
    key = torch.empty(size, dtype=torch.int32, device=codes.device)
    direct = not packed and out.dtype == torch.float32
    found = torch.empty(0 if direct else size, dtype=table.dtype, device=codes.device)
    for start in range(0, count, step):
        part = values[start : start + step]
        needed = _code_count(part.numel(), packed)
        k, entries = key[:needed], part if direct else found[:needed]
        k.copy_(flat_codes[start // 2 if packed else start :][:needed])
        torch.index_select(table, 0, k, out=entries)
        entries = entries.view(torch.float32)[: part.numel()]
        for top, unit, target in _by_block(block, flat_scale[start // block :], entries, part):
            torch.mul(unit, top.unsqueeze(1), out=target)
    return out


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte: the one at an even place in the low nibble, the next in the high.

    Args:
        codes: (..., n), uint8, below 16.

    Returns:
        (..., ceil(n / 2)), uint8. If n is odd, the last high nibble is 0.
    """
    codes = functional.pad(codes, (0, 1)) if codes.shape[-1] % 2 else codes.contiguous()
    if codes.storage_offset() % 2:  # no place for a 16-bit number
        codes = codes.clone()
    both = codes.view(torch.int16)  # 0000hhhh0000llll
    return (both >> 4).bitwise_or_(both).to(torch.uint8)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The codes that `pack_nibbles` packed.

    Args:
        packed: (..., ceil(count / 2)), uint8.
        count: codes along the last dimension.

    Returns:
        (..., count), uint8; a view of an even number of codes if `count` is odd.

    Raises:
        ValueError: `count` is not 2 k - 1 or 2 k for k bytes.
    """
    if (count + 1) // 2 != packed.shape[-1]:
        raise ValueError(f"count={count} does not fit {packed.shape[-1]} bytes of two codes")
    both = packed.to(torch.int16)
    both.bitwise_or_(both << 4).bitwise_and_(0x0F0F)
    return both.view(torch.uint8)[..., :count]


def _step(block: int, device: torch.device) -> int:
    """Whole blocks in work at once, in elements."""
    return max(1, _PIECE.get(device.type, _PIECE["other"]) // block) * block


def _by_block(block: int, scale: Tensor, *flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Scales (k,) and equal flat tensors as (k, block); then those of a shorter last block."""
    whole = flat[0].numel() // block
    if whole:
        yield scale[:whole], *(part[: whole * block].view(whole, block) for part in flat)
    if whole * block < flat[0].numel():
        yield scale[whole : whole + 1], *(part[whole * block :].view(1, -1) for part in flat)


def _code_count(count: int, packed: bool) -> int:
    return (count + 1) // 2 if packed else count


def _check_codebook(codebook: Tensor, block: int, packed: bool) -> None:
    if codebook.dtype != torch.float32:
        raise TypeError(f"codebook must be float32, got {codebook.dtype}")
    most = 16 if packed else 256
    if codebook.ndim != 1 or not 2 <= codebook.numel() <= most:
        raise ValueError(
            f"codebook must have the shape (n,), n from 2 to {most}, got {tuple(codebook.shape)}"
        )
    if block < 1 or (packed and block % 2):
        raise ValueError(f"block must be positive{', and even if packed' * packed}, got {block}")


def _target(
    name: str, given: Tensor | None, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor given, checked, or a new flat one."""
    if given is None:
        return torch.empty(count, dtype=dtype, device=device)
    if given.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {given.dtype}")
    if given.numel() != count or not given.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous with {count} elements, got shape {tuple(given.shape)}"
        )
    return given
