"""The orthonormal discrete cosine transform, as chosen columns and by FFT.

The transform of length n is Q with Q[j, i] = s_i cos(pi i (2 j + 1) / (2 n)), s_0 = sqrt(1/n), else
sqrt(2/n); column i is the i-th DCT-II basis vector and Q is orthogonal. The fast form is "A fast
cosine transform in one and two dimensions" (Makhoul, 1980). Used as a fixed basis by "SVD-Free
Low-Rank Adaptive Gradient Optimization for Large Language Models" (2025, arXiv:2505.17967), whose
code picks columns of Q (by its FFT) or of Qᵀ (by its matrix product): `inverse` here.
"""

import math

import torch
from torch import Tensor

from .dtypes import compute_dtype


def dct_basis(
    n: int,
    index: Tensor | None = None,
    *,
    inverse: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Columns of the orthogonal DCT-II matrix Q, or of its transpose.

    Args:
        n: length of a column.
        index: which columns, integers (..., r) in [0, n); None for all n in order. Nothing of size
            n x n is formed for fewer.
        inverse: take columns of Qᵀ, the inverse transform (DCT-III) instead of Q.
        dtype: of the result.
        device: of the result; the index's own device when None.

    Returns:
        (..., n, r).

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if index is None:
        index = torch.arange(n, device=device)
    index = index.to(device=device, dtype=torch.int64)
    along = torch.arange(n, device=index.device).unsqueeze(-1)
    chosen = index.unsqueeze(-2)
    frequency, place = (along, chosen) if inverse else (chosen, along)
    # Angles are multiples of pi / 2n with period 4n: reducing them as integers keeps full accuracy
    # for large n, and one short table replaces a cosine per entry.
    steps = torch.arange(4 * n + 1, dtype=torch.float64, device=index.device)
    table = torch.cos(steps * (math.pi / (2 * n))) * math.sqrt(2 / n)
    table[-1] = math.sqrt(1 / n)
    step = torch.where(frequency == 0, 4 * n, frequency * (2 * place + 1) % (4 * n))
    return table.to(dtype)[step]


def dct(x: Tensor, dim: int = -1, *, inverse: bool = False) -> Tensor:
    """The orthonormal DCT-II of `x` along `dim` by one real FFT, or its inverse.

    Along the last dimension this is `x @ dct_basis(n, inverse=inverse)`.

    Args:
        x: any shape, real floating.
        dim: the dimension to transform.
        inverse: apply Qᵀ instead of Q; `dct(dct(x), inverse=True)` is `x`.

    Returns:
        The shape of `x`, in float32 (float64 for float64 input).
    """
    x = x.to(compute_dtype(x.dtype)).movedim(dim, -1)
    return (_inverse(x) if inverse else _forward(x)).movedim(-1, dim)


def _twiddle(x: Tensor, n: int, *, inverse: bool = False) -> Tensor:
    """exp(-i pi k / 2n) times the orthonormal scale, for a real FFT's frequencies; or 1 / it."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64, device=x.device) * (-math.pi / (2 * n))
    scale = torch.full_like(angle, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    factor = torch.polar(scale.reciprocal(), -angle) if inverse else torch.polar(scale, angle)
    return factor.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)


def _forward(x: Tensor) -> Tensor:
    n = x.shape[-1]
    # Even places in order, then odd places backwards: the DCT becomes a real FFT of length n.
    reordered = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    spectrum = torch.fft.rfft(reordered) * _twiddle(x, n)
    high = -spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)
    return torch.cat([spectrum.real, high], dim=-1)


def _inverse(x: Tensor) -> Tensor:
    n = x.shape[-1]
    half = n // 2 + 1
    imaginary = torch.zeros_like(x[..., :half])
    imaginary[..., 1 : (n + 1) // 2] = -x[..., half:].flip(-1)
    if n % 2 == 0:
        # At the middle frequency the real and the imaginary part are the same coefficient.
        imaginary[..., n // 2] = -x[..., n // 2]
    # A complex division takes five times as long as a multiplication.
    spectrum = torch.complex(x[..., :half].contiguous(), imaginary).mul_(
        _twiddle(x, n, inverse=True)
    )
    reordered = torch.fft.irfft(spectrum, n=n)
    restored = torch.empty_like(reordered)
    restored[..., ::2] = reordered[..., : (n + 1) // 2]
    restored[..., 1::2] = reordered[..., (n + 1) // 2 :].flip(-1)
    return restored
