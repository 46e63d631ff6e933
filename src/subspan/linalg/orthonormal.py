"""Orthonormal columns: Cholesky QR where it is accurate, Householder QR where it is not.

CholeskyQR2 is from "CholeskyQR2: a simple and communication-avoiding algorithm for computing a
tall-skinny QR factorization on a large-scale parallel system" (Fukaya, Nakatsukasa, Yanagisawa,
Yamamoto, 2014).
"""

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .shapes import check_matrix

_SECOND_PASS_LIMIT = 0.1
"""How far from the identity the Gram matrix may be after one pass for the second to finish it."""


def orthonormalise(x: Tensor) -> Tensor:
    """Orthonormal columns whose span contains the columns of `x`: the Q of x = Q R, diag(R) >= 0.

    Columns that depend on earlier ones (repeated, zero) are replaced by deterministic directions
    orthogonal to all others, so the result is orthonormal for every finite `x`.

    Args:
        x: (..., d, r) with r <= d.

    Returns:
        (..., d, r) in float32, or float64 for float64 input.

    Raises:
        ValueError: `x` is not a matrix or has more columns than rows.

    Note:
        Decides from the values whether the fast path was accurate, so it synchronises with a GPU.
    """
    check_matrix("x", x)
    if x.shape[-1] > x.shape[-2]:
        raise ValueError(
            f"x must have no more columns than rows to be made orthonormal, got {tuple(x.shape)}"
        )
    work = x.to(compute_dtype(x.dtype))
    if work.numel() == 0:
        return work.clone()
    # Columns of equal size: Gram entries of tiny gradients would underflow, and the Cholesky factor
    # of a badly scaled Gram matrix loses digits for no reason.
    work = work / divisor(work.abs().amax(-2, keepdim=True))

    gram = work.mT @ work
    factor, info = torch.linalg.cholesky_ex(gram)
    good = info == 0
    if not bool(good.any()):
        return householder_basis(work)
    basis: Tensor = torch.linalg.solve_triangular(factor.mT, work, upper=True, left=False)
    gram = basis.mT @ basis
    factor, info = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    good = good & (info == 0) & ((gram - identity).abs().amax((-2, -1)) < _SECOND_PASS_LIMIT)
    if not bool(good.any()):
        return householder_basis(work)
    basis = torch.linalg.solve_triangular(factor.mT, basis, upper=True, left=False)
    if not bool(good.all()):
        basis = basis.contiguous()
        basis[~good] = householder_basis(work[~good])
    return basis


def divisor(magnitude: Tensor) -> Tensor:
    """`magnitude` >= 0 made safe to divide by: 1 instead of 0, and with a finite inverse."""
    safe = torch.where(magnitude > 0, magnitude, 1.0)
    return safe.clamp(min=torch.finfo(magnitude.dtype).tiny)


def householder_basis(x: Tensor) -> Tensor:
    """The Q of a Householder QR of `x` (..., d, r), with signs such that diag(R) >= 0.

    Slower than `orthonormalise`; its result depends only on `x`, whatever its conditioning.
    """
    basis, triangle = torch.linalg.qr(x.to(compute_dtype(x.dtype)))
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    signed: Tensor = basis * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    return signed
