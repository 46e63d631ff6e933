"""The row-wise affine quantiser in which DCT-AdamW keeps its error feedback.

With low and high the extremes of a row of a matrix and L = 2^b - 1 levels above the lowest, b bits,

    step = (high - low) / L,   code = floor((x - low) / step + 0.5),   x is read back as
    code * step + low,

at most step / 2 away. 4-bit codes are packed as by `pack_nibbles`, each row in bytes of its own.

From "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models" (2025,
arXiv:2505.17967), after MicroAdam (2024, arXiv:2405.15593). The released code has two faults, which
`as_released=True` keeps: with 8 bits L is 15 as well, so that codes above 15 are never used; with 4
bits a matrix is read back with all codes at even places first and those at odd places behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantise import pack_nibbles, unpack_nibbles

_PIECE = {"cpu": 1 << 17, "other": 1 << 22}
"""Elements in work at once: cache-sized on the CPU, few kernels elsewhere."""


@torch.no_grad()
def quantise_rows(
    x: Tensor,
    bits: int,
    *,
    as_released: bool = False,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, lowest values and steps of the rows of `x`; the mathematics is at the top.

    Computed in float32. A row of equal values is read back exactly; a row with a value that is not
    finite is read back as values that are not finite.

    Args:
        x: (..., m, n), any floating dtype; not changed. One that is not contiguous is copied.
        bits: 4 or 8.
        as_released: with 8 bits, use 16 levels only (see above).
        out: codes, low and step to write into, contiguous, of the sizes and dtypes below.

    Returns:
        codes (..., m, n), or (..., m, ceil(n / 2)) with 4 bits, uint8; low and step (..., m),
        float32; or `out`.

    Raises:
        TypeError: `x` is not of a floating dtype.
        ValueError: `bits` is neither 4 nor 8, `x` has fewer than two dimensions, or `out` is of
            other sizes.
    """
    _check_bits(bits)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have the shape (..., m, n), got {tuple(x.shape)}")
    columns, lead = x.shape[-1], x.shape[:-1]
    width = _row_bytes(columns, bits)
    if out is None:
        codes = torch.empty(*lead, width, dtype=torch.uint8, device=x.device)
        low = torch.empty(lead, dtype=torch.float32, device=x.device)
        out = codes, low, torch.empty_like(low)
    sizes, wanted = tuple(part.numel() for part in out), (lead.numel() * width, *[lead.numel()] * 2)
    if sizes != wanted:
        raise ValueError(f"out must hold {wanted} codes, lows and steps, got {sizes}")
    if x.numel() == 0:
        return out
    rows, codes = x.detach().reshape(-1, columns), out[0].view(-1, width)
    low, step = (part.view(-1, 1) for part in out[1:])
    levels = 255 if bits == 8 and not as_released else 15
    for part in _pieces(rows):
        values = rows[part].float()
        torch.amin(values, 1, keepdim=True, out=low[part])
        torch.sub(values.amax(1, keepdim=True), low[part], out=step[part]).div_(levels)
        steps = (values - low[part]).div_(step[part] + (step[part] == 0)).add_(0.5)
        # By way of int32, which is faster. The upper bound matters for subnormal steps and for NaN.
        found = steps.to(torch.int32).clamp_(0, levels).to(torch.uint8)
        codes[part].copy_(pack_nibbles(found) if bits == 4 else found)
    return out


@torch.no_grad()
def dequantise_rows(
    codes: Tensor,
    low: Tensor,
    step: Tensor,
    columns: int,
    bits: int,
    *,
    as_released: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values code * step + low of what `quantise_rows` returned.

    Computed in float32, rounded once to the dtype of the result.

    Args:
        codes: (..., m, n), or (..., m, ceil(n / 2)) with 4 bits, uint8, contiguous.
        low: (..., m), float32, contiguous.
        step: (..., m), float32, contiguous.
        columns: n.
        bits: 4 or 8.
        as_released: with 4 bits, permute the codes of each matrix (see above), by way of one byte
            per element.
        out: (..., m, n), contiguous, any floating dtype: written and returned.
        dtype: of the result without `out`.

    Returns:
        (..., m, n), or `out`.

    Raises:
        ValueError: `bits` is neither 4 nor 8, or sizes do not fit one another.
    """
    _check_bits(bits)
    width, shape = _row_bytes(columns, bits), (*low.shape, columns)
    if codes.shape != (*low.shape, width) or step.shape != low.shape:
        raise ValueError(
            f"codes, low and step must have the shapes (..., m, {width}), (..., m) and (..., m), "
            f"got {tuple(codes.shape)}, {tuple(low.shape)} and {tuple(step.shape)}"
        )
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    if out.shape != shape:
        raise ValueError(f"out must have the shape {shape}, got {tuple(out.shape)}")
    if out.numel() == 0:
        return out
    if bits == 4 and as_released:
        places = unpack_nibbles(codes, columns).flatten(-2)
        codes = torch.cat([places[..., ::2], places[..., 1::2]], dim=-1)
        width, bits = columns, 8
    rows, codes = out.view(-1, columns), codes.view(-1, width)
    low, step = low.view(-1, 1), step.view(-1, 1)
    for part in _pieces(rows):
        found = unpack_nibbles(codes[part], columns) if bits == 4 else codes[part]
        # Not one fused multiply-add: that would round otherwise.
        rows[part].copy_(found.float().mul_(step[part]).add_(low[part]))
    return out


def _pieces(rows: Tensor) -> list[slice]:
    """Slices of (m, n) rows of about as many elements as are in work at once."""
    size = max(1, _PIECE.get(rows.device.type, _PIECE["other"]) // rows.shape[1])
    return [slice(first, first + size) for first in range(0, rows.shape[0], size)]


def _row_bytes(columns: int, bits: int) -> int:
    return (columns + 1) // 2 if bits == 4 else columns


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
