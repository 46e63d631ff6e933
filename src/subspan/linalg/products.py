"""Matrix products that write into memory the caller owns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import broadcast_batch

# Smaller blocks of a symmetric product cost more in calls and copies than they save.
_SMALLEST_HALF = 128


def store(value: Tensor, out: Tensor | None) -> Tensor:
    """`value` itself, or copied into `out` (converted to its dtype) when that is given.

    Raises:
        ValueError: `out` has another shape.
    """
    if out is None:
        return value
    check_out(out, value.shape)
    return out.copy_(value)


def check_out(out: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `out` has `shape`."""
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}")


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b for `a` (..., m, k) and `b` (..., k, n) of one dtype, into `out` when given.

    Raises:
        ValueError: `out` has another shape than the product.
    """
    if out is None or out.dtype != a.dtype:
        return store(a @ b, out)
    # Broadcasting shapes is slow Python, and plain matrices are the optimizers' hot path.
    plain = a.ndim == b.ndim == 2
    batch = () if plain else broadcast_batch(a.shape[:-2], b.shape[:-2])
    check_out(out, (*batch, a.shape[-2], b.shape[-1]))
    return torch.matmul(a, b, out=out)


def add_scaled_(target: Tensor, x: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """target <- beta * target + alpha * x, in place; beta = 0 ignores what target held.

    A target of another dtype is rounded once, from a sum in the dtype of `x`.
    """
    if beta == 0:
        return target.copy_(alpha * x)
    if target.dtype != x.dtype:
        return target.copy_((alpha * x).add_(target, alpha=beta))
    if beta != 1:
        target.mul_(beta)
    return target.add_(x, alpha=alpha)


def add_product_(
    target: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """target <- beta * target + alpha * a @ b, in place; beta = 0 ignores what target held.

    `target` is (..., m, n), `a` (..., m, k), `b` (..., k, n); the leading dimensions of `a` and `b`
    broadcast to those of `target`. Needs no full-size temporary when all dtypes are equal. A target
    of lower precision is rounded once, from a sum in the dtype of `a`, which takes one.
    """
    if target.dtype != a.dtype:
        return add_scaled_(target, a @ b, alpha=alpha, beta=beta)
    if target.ndim == 2:
        return target.addmm_(a, b, alpha=alpha, beta=beta)
    batch = target.shape[:-2]
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    if target.ndim == 3:
        return target.baddbmm_(a, b, alpha=alpha, beta=beta)
    for part, left, right in zip(target.unbind(0), a.unbind(0), b.unbind(0), strict=True):
        add_product_(part, left, right, alpha=alpha, beta=beta)
    return target


def add_symmetric_product_(
    target: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """`add_product_` for a symmetric target and a product that is symmetric, as X Xᵀ is.

    On the CPU the blocks above the diagonal are copies of those below, down to small blocks on the
    diagonal: three quarters of the work per halving, towards half of it for large matrices.

    Args:
        target: (..., k, k), symmetric unless `beta` is 0.
        a: (..., k, l).
        b: (..., l, k), so that a @ b is symmetric: the transpose of `a`, or both are symmetric and
            commute.
        alpha: factor on the product.
        beta: factor on what target held; 0 ignores it.
    """
    half = target.shape[-1] // 2
    if half < _SMALLEST_HALF or target.device.type != "cpu":
        return add_product_(target, a, b, alpha=alpha, beta=beta)
    upper, lower = slice(half), slice(half, None)
    for part in (upper, lower):
        block = target[..., part, part]
        add_symmetric_product_(block, a[..., part, :], b[..., part], alpha=alpha, beta=beta)
    below = target[..., lower, upper]
    add_product_(below, a[..., lower, :], b[..., upper], alpha=alpha, beta=beta)
    target[..., upper, lower].copy_(below.mT)
    return target
