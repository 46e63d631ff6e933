"""The orthonormal discrete cosine transform, as chosen columns and by FFT.

The transform of length n is Q with Q[j, i] = s_i cos(pi i (2 j + 1) / (2 n)), s_0 = sqrt(1/n), else
sqrt(2/n); column i is the i-th DCT-II basis vector and Q is orthogonal. The fast form is "A fast
cosine transform in one and two dimensions" (Makhoul, 1980). Used as a fixed basis by "SVD-Free
Low-Rank Adaptive Gradient Optimization for Large Language Models" (2025, arXiv:2505.17967), whose
code picks columns of Q (by its FFT) or of Qᵀ (by its matrix product): `inverse` here.
"""

import math
from functools import lru_cache

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
    if inverse:
        return shuffled_inverse(x, dim).index_select(dim, shuffled_places(x.shape[dim], x.device))
    return _forward(x.to(compute_dtype(x.dtype)).movedim(dim, -1)).movedim(-1, dim)


def shuffled_inverse(x: Tensor, dim: int = -1) -> Tensor:
    """`dct(x, dim, inverse=True)` with the outputs in the order in which the FFT leaves them.

    Putting them in order would take as long as the FFT itself; see `shuffled_places`.
    """
    x = x.to(compute_dtype(x.dtype))
    n = x.shape[dim]
    mirror, factor = _inverse_tables(n, x.dtype, x.device)
    # The sign of the imaginary part only reverses the outputs. A real FFT ignores that of the first
    # frequency.
    spectrum = torch.complex(x.narrow(dim, 0, len(mirror)), x.index_select(dim, mirror))
    spectrum.movedim(dim, -1).mul_(factor)
    return torch.fft.irfft(spectrum, n=n, dim=dim)


@lru_cache(maxsize=32)
def shuffled_places(n: int, device: torch.device | str | None = None) -> Tensor:
    """Where `shuffled_inverse` puts each output of a transform of length n: (n) int64.

    One tensor for all who ask; never written to.
    """
    output = torch.arange(n, device=device)
    ordered = torch.where(output % 2 == 0, output // 2, n - 1 - output // 2)
    return (n - ordered) % n


@lru_cache(maxsize=32)
def _inverse_tables(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The frequency -k that goes with each k of a real FFT, and the factor of the pair."""
    frequency = torch.arange(n // 2 + 1, device=device)
    factor = _twiddle(n, device).reciprocal().conj_physical()
    return ((n - frequency) % n).int(), factor.to(dtype.to_complex())


def _twiddle(n: int, device: torch.device) -> Tensor:
    """exp(-i pi k / 2n) times the orthonormal scale, for a real FFT's frequencies k."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64, device=device) * (-math.pi / (2 * n))
    scale = torch.full_like(angle, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return torch.polar(scale, angle)


def _forward(x: Tensor) -> Tensor:
    n = x.shape[-1]
    # Even places in order, then odd places backwards: the DCT becomes a real FFT of length n.
    reordered = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    spectrum = torch.fft.rfft(reordered) * _twiddle(n, x.device).to(x.dtype.to_complex())
    high = -spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)
    return torch.cat([spectrum.real, high], dim=-1)
