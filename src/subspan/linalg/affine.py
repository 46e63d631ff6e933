"""The blockwise affine quantiser of Q-GaLore: unsigned codes, one scale and one zero per group.

A tensor is taken flat in row-major order, in groups of g values (the last one may be shorter). With
lo and hi the least and the largest value of a group and zero, and b bits,

    s = max(hi - lo, 1e-5) / (2^b - 1)
    z = round(-lo / s)
    q = clamp(round(w / s) + z, 0, 2^b - 1),   and q stands for s (q - z)

Rounding is to nearest, ties to even, or up with the probability that the fraction of w / s gives:
then the mean of s (q - z) is w, except within the last half step at either end of the range, where
the clamp acts. Quantising decoded values again may give others: if an extreme of the group was
rounded inwards, the new steps are a little smaller and every value is rounded anew.

From "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients" (2024,
arXiv:2407.08296). The released code leaves zero out of the range of a group, lo and hi being the
extremes of the values alone, and then clamps z into [0, 2^b - 1]: equal to the above where a group
holds values of both signs, but a group of one sign loses what lies beyond the clamp, all of it if
the group is far from zero. `zero_in_range=False` is that code.
"""

import torch
from torch import Tensor

_SMALLEST_RANGE = 1e-5
"""Of a group, as in the released code: values much closer to zero than this become zero."""

_CHUNK = {"cpu": 1 << 17, "other": 1 << 24}
"""Elements in work at once: cache-sized on the CPU, few kernels elsewhere."""


@torch.no_grad()
def quantise_affine(
    x: Tensor,
    bits: int,
    group: int = 256,
    *,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    zero_in_range: bool = True,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of `x`; the mathematics is at the top of this module.

    Computed in float32. Rounds to nearest unless `uniforms` or `generator` is given. A value that
    is not finite makes the scale of its group infinite or NaN, so that the group decodes to values
    that are not finite either.

    Args:
        x: any shape and floating dtype; not changed.
        bits: of a code, 1 to 8. A code takes one byte whatever its bits.
        group: values that share a scale.
        uniforms: float32 numbers of [0, 1) that decide stochastic rounding: (groups, group); w / s
            is rounded up where its fraction exceeds the number.
        generator: draws 16-bit uniforms instead, on the device of `x`; one 64-bit draw serves four
            values. A value the codes represent is never moved by it.
        zero_in_range: whether the range of every group includes zero (see above).
        out: codes, scales and zeros to write into, contiguous, in the dtypes below; shaped as one
            likes.

    Returns:
        codes (x.numel()) uint8, scale (groups) float32, zero (groups) uint8; or `out`.

    Raises:
        TypeError: `x` is not of a real floating dtype.
        ValueError: `bits` or `group` out of range, both sources of randomness, or `uniforms` or
            `out` of a wrong size.
    """
    _check(x, bits, group)
    count, groups = x.numel(), group_count(x.numel(), group)
    if uniforms is not None and generator is not None:
        raise ValueError("uniforms and generator are two sources of randomness: give one of them")
    if uniforms is not None and tuple(uniforms.shape) != (groups, group):
        raise ValueError(
            f"uniforms must have the shape (groups, group) = {(groups, group)}, "
            f"got {tuple(uniforms.shape)}"
        )
    if out is None:
        codes = torch.empty(count, dtype=torch.uint8, device=x.device)
        scale = torch.empty(groups, dtype=torch.float32, device=x.device)
        out = codes, scale, torch.empty(groups, dtype=torch.uint8, device=x.device)
    sizes = tuple(part.numel() for part in out)
    if sizes != (count, groups, groups):
        raise ValueError(
            f"out must hold {count} codes, {groups} scales and {groups} zeros, got {sizes}"
        )
    if x.is_meta:  # Shapes are all there is; going through the pieces would take seconds.
        return out
    values = x.detach().reshape(-1)
    codes, scale, zero = (part.view(-1) for part in out)
    pieces = _pieces(count, group, x.device)
    scratch = _scratch(pieces, torch.float32, x.device), _scratch(pieces, torch.int32, x.device)
    for elements, rows in pieces:
        piece = values[elements]
        noise = None
        if uniforms is not None:
            noise = uniforms[rows].reshape(-1)[: piece.numel()]
        elif generator is not None:
            noise = _uniforms(piece.numel(), generator, x.device)
        parts = codes[elements], scale[rows].unsqueeze(1), zero[rows].unsqueeze(1)
        _quantise_piece(piece, parts, 2**bits - 1, noise, zero_in_range, scratch)
    return out


@torch.no_grad()
def dequantise_affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: int = 256,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values s (q - z) of what `quantise_affine` returned.

    Computed in float32, rounded once to the dtype of the result.

    Args:
        codes: uint8, contiguous, any shape.
        scale: float32 (groups).
        zero: uint8 (groups).
        group: as it was quantised with.
        out: contiguous, as many elements as `codes`, any shape and floating dtype; written and
            returned.
        dtype: of the result without `out`.

    Returns:
        codes.numel() values, flat; or `out`.

    Raises:
        ValueError: the sizes do not fit one another.
    """
    count, groups = codes.numel(), group_count(codes.numel(), group)
    if scale.numel() != groups or zero.numel() != groups:
        raise ValueError(
            f"scale and zero must have {groups} elements for {count} codes in groups of {group}, "
            f"got {scale.numel()} and {zero.numel()}"
        )
    if out is None:
        out = torch.empty(count, dtype=dtype, device=codes.device)
    if out.numel() != count:
        raise ValueError(f"out must have {count} elements, got {out.numel()}")
    flat, values = codes.view(-1), out.view(-1)
    pieces = _pieces(count, group, codes.device)
    scratch = None
    if out.dtype != torch.float32:
        scratch = _scratch(pieces, torch.float32, codes.device)
    for elements, rows in pieces:
        target = values[elements]
        exact = target if scratch is None else scratch[: target.numel()]
        exact.copy_(flat[elements])
        offset, step = zero[rows].unsqueeze(1).float(), scale[rows].unsqueeze(1)
        exact.view(step.shape[0], -1).sub_(offset).mul_(step)
        if scratch is not None:
            target.copy_(exact)
    return out


def group_count(count: int, group: int) -> int:
    """Groups of `group` values that `count` values make; the last one may be shorter."""
    return -(-count // group)


def _quantise_piece(
    values: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    largest: int,
    noise: Tensor | None,
    zero_in_range: bool,
    scratch: tuple[Tensor, Tensor],
) -> None:
    """Quantise the groups of flat `values` into codes (flat), scale and zero (columns)."""
    codes, scale, zero = parts
    work, integers = (memory[: values.numel()] for memory in scratch)
    if values.dtype != work.dtype:
        values = work.copy_(values)
    grouped = values.view(scale.shape[0], -1)
    low, high = grouped.amin(dim=1, keepdim=True), grouped.amax(dim=1, keepdim=True)
    if zero_in_range:
        low.clamp_(max=0)
        high.clamp_(min=0)
    scale.copy_(high.sub_(low).clamp_(min=_SMALLEST_RANGE).div_(largest))
    offset = low.div_(scale).round_().neg_().clamp_(0, largest)
    zero.copy_(offset)
    steps = torch.div(grouped, scale, out=work.view(grouped.shape))
    if noise is None:
        steps.round_()
    else:
        whole = steps.floor()
        steps.sub_(whole).gt_(noise.view(steps.shape)).add_(whole)
    steps.add_(offset).clamp_(0, largest)
    # Twice as fast as from float32 to uint8 at once.
    codes.copy_(integers.copy_(work))


def _uniforms(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """The middles of 2^16 equal parts of [0, 1), at random.

    Drawing is what costs most on a CPU, hence four numbers of one draw. Finer ones would add
    little: next to 2^7 < w / s < 2^8 float32 has 16 bits left for the fraction.
    """
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:count].to(torch.float32).mul_(2**-16).add_(0.5 + 2**-17)


def _pieces(count: int, group: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Elements and their groups, piece by piece; a shorter last group is a piece of its own."""
    whole = count // group
    step = max(1, _CHUNK.get(device.type, _CHUNK["other"]) // group)
    pieces = []
    for first in range(0, whole, step):
        last = min(first + step, whole)
        pieces.append((slice(first * group, last * group), slice(first, last)))
    if count % group:
        pieces.append((slice(whole * group, count), slice(whole, whole + 1)))
    return pieces


def _scratch(pieces: list[tuple[slice, slice]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the largest piece."""
    size = max((elements.stop - elements.start for elements, _ in pieces), default=0)
    return torch.empty(size, dtype=dtype, device=device)


def _check(x: Tensor, bits: int, group: int) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be of a real floating dtype, got {x.dtype}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
