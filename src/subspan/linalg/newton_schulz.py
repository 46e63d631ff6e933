"""Approximate orthogonalisation by matrix products alone, as Muon uses it."""

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .products import add_symmetric_product_, product
from .shapes import check_matrix

# Steps between products with X, and from which ratio of its sides such groups pay.
_GROUP, _WIDE = 3, 1.5


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
    work = x.to(dtype or compute_dtype(x.dtype))
    fresh = overwrite or work is not x
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        work = work.mT
    norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True).clamp_(min=eps)
    shape = work.shape
    work = work.div_(norm) if fresh else work / norm
    work = work if work.dim() == 2 else work.reshape(-1, *shape[-2:])
    work = (_in_place if dtype is None else _as_written)(work, steps, coefficients).reshape(shape)
    return work.mT if tall else work


def _as_written(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """The iteration with the roundings of its formula, which matter in few bits."""
    a, b, c = coefficients
    x = x.reshape(-1, *x.shape[-2:])
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _in_place(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """The iteration in the memory of `x` (on the CPU) and of four short x short matrices.

    Every step is X <- P X with P = a I + b A + c A², so that A <- P A P. Where X is wide, a group
    of steps only follows A and the product of its P, and multiplies X by that once. Rounding errors
    of A near its small eigenvalues grow by up to a² in each step of a group; a new A from X ends
    that. In groups of three the result is about as exact as without.
    """
    a, b, c = coefficients
    short, long = x.shape[-2:]
    group = _GROUP if long >= _WIDE * short else 1
    gram, value, total, spare = (x.new_empty(*x.shape[:-1], short) for _ in range(4))
    for start in range(0, steps, group):
        add_symmetric_product_(gram, x, x.mT, beta=0.0)
        last = min(group, steps - start) - 1
        for step in range(last + 1):
            value.copy_(gram)
            add_symmetric_product_(value, gram, gram, beta=b, alpha=c)
            value.diagonal(dim1=-2, dim2=-1).add_(a)
            if step < last:
                add_symmetric_product_(spare, gram, value, beta=0.0)
                add_symmetric_product_(gram, value, spare, beta=0.0)
            if step == 0:
                total, value = value, total
            else:
                add_symmetric_product_(spare, total, value, beta=0.0)
                total, spare = spare, total
        if x.device.type != "cpu":
            x = total @ x
            continue
        # Another matrix of the size of X would cost page faults.
        for part in x.split(short, -1):
            part.copy_(product(total, part, spare[..., : part.shape[-1]]))
    return x
