"""Stochastic rounding of float32 to bfloat16."""

import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 16, "other": 1 << 22}
"""Elements rounded at once: cache-sized on the CPU, few kernels elsewhere."""


def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator) -> Tensor:
    """Write float32 `source` into bfloat16 `target` in place, rounding up or down at random.

    The probability of rounding up is the distance to the lower neighbour in units of the gap, so
    the expectation of the result is `source`. Values that bfloat16 represents stay as they are;
    infinities and NaN are kept.

    Args:
        target: bfloat16, any shape.
        source: float32, the shape of `target`; not changed.
        generator: on the device of `source`; advances by one 64-bit draw per four elements
            of each block that is rounded at once.

    Returns:
        `target`.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes differ.
    """
    if target.dtype != torch.bfloat16 or source.dtype != torch.float32:
        raise TypeError(
            "stochastic_round_ writes float32 source into bfloat16 target, "
            f"got source {source.dtype} and target {target.dtype}"
        )
    if target.shape != source.shape:
        raise ValueError(
            f"source must have the shape of target {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    if target.is_contiguous() and source.is_contiguous():
        size = _CHUNK.get(source.device.type, _CHUNK["other"])
        parts = (torch.split(flat, size) for flat in (target.view(-1), source.view(-1)))
        chunks = zip(*parts, strict=True)
        for target_part, source_part in chunks:
            _round_chunk_(target_part, source_part, generator)
    else:
        _round_chunk_(target, source.contiguous(), generator)
    return target


def _round_chunk_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Add noise to the 16 bits that bfloat16 drops, then drop them: the carry rounds up."""
    count = source.numel()
    # One 64-bit draw serves four elements; drawing is what costs most on a CPU.
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=source.device)
    draws.random_(-(2**63), None, generator=generator)
    bits = draws.view(torch.int16)[:count].to(torch.int32).view(source.shape)
    bits.bitwise_and_(0xFFFF)
    # A carry would turn infinity into NaN. The quiet NaNs that arithmetic makes keep their top
    # mantissa bit, so cutting them leaves NaN.
    bits.mul_(source.abs() < torch.inf)
    bits.add_(source.view(torch.int32)).bitwise_and_(-0x10000)
    target.copy_(bits.view(torch.float32))
