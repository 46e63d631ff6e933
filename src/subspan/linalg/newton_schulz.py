"""Approximate orthogonalisation by matrix products alone, as Muon uses it."""

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .shapes import check_matrix


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """Move all singular values of `x` towards 1 by a quintic Newton-Schulz iteration.

        X <- x / max(||x||_F, eps)
        A = X Xᵀ;  X <- a X + (b A + c A²) X        (`steps` times, with rows <= columns)

    The default coefficients do not converge to U Vᵀ: singular values end at about 0.7 to 1.2, which
    reaches small ones in fewer steps and serves an optimizer as well. Singular values below about
    1e-3 of the norm are not lifted all the way in five steps.

    Args:
        x: (..., m, n).
        steps: number of iterations.
        coefficients: (a, b, c).
        eps: lower bound of the norm, so that zero stays zero.
        dtype: dtype of the arithmetic and of the result; None for float32 (float64 for float64
            input), torch.bfloat16 for the arithmetic of `torch.optim.Muon`.
        overwrite: let the iteration use the memory of `x`, which saves one matrix.

    Returns:
        (..., m, n).

    Raises:
        ValueError: `x` is not a matrix, or `steps` is negative.

    References:
        "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024,
        https://kellerjordan.github.io/posts/muon/).
    """
    check_matrix("x", x)
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    a, b, c = coefficients
    work = x.to(dtype or compute_dtype(x.dtype))
    fresh = overwrite or work is not x
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        work = work.mT
    norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True).clamp_(min=eps)
    shape = work.shape
    work = (work.div_(norm) if fresh else work / norm).reshape(-1, *shape[-2:])
    other: Tensor | None = None
    for _ in range(steps):
        gram = work @ work.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        del gram
        result = torch.baddbmm(work, polynomial, work, beta=a, out=other)
        # Two matrices take turns, unless the rounding of a given dtype must not depend on layouts.
        work, other = result, work if dtype is None else None
    work = work.reshape(shape)
    return work.mT if tall else work
