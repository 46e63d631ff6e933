"""Reading and updating chosen rows, columns or entries of a batch of matrices."""

import torch
from torch import Tensor

from .shapes import broadcast_batch


def _along(index: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """`index` (..., r) as a view whose r runs along `dim` and whose other dimension repeats."""
    if dim == -2:
        return index.unsqueeze(-1).expand(*shape[:-2], index.shape[-1], shape[-1])
    return index.unsqueeze(-2).expand(*shape[:-1], index.shape[-1])


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Chosen rows (dim -2) or columns (dim -1) of `x` (..., m, n); `index` is (r) or (..., r)."""
    if index.ndim == 1:
        return x.index_select(dim, index)
    x = x.expand(*broadcast_batch(x.shape[:-2], index.shape[:-1]), *x.shape[-2:])
    return x.gather(dim, _along(index, x.shape, dim))


def put_(target: Tensor, index: Tensor, values: Tensor, dim: int) -> Tensor:
    """Replace chosen rows (dim -2) or columns (dim -1) of `target` (..., m, n), in place.

    The indices of one matrix must be distinct.
    """
    values = values.to(target.dtype)
    if index.ndim == 1:
        return target.index_copy_(dim, index, values.expand(*target.shape[:-2], *values.shape[-2:]))
    return target.scatter_(dim, _along(index, target.shape, dim), values)


def add_at_(
    target: Tensor, index: Tensor, values: Tensor, dim: int, *, alpha: float, beta: float
) -> Tensor:
    """target <- beta * target, plus alpha * values on chosen rows or columns, in place.

    Only temporaries of the size of `values` are made. The chosen part is rounded to the dtype of
    `target` once. The indices of one matrix must be distinct.
    """
    if beta == 0:
        return put_(target.zero_(), index, alpha * values, dim)
    chosen = take(target, index, dim).to(values.dtype).mul(beta).add(values, alpha=alpha)
    if beta != 1:
        target.mul_(beta)
    return put_(target, index, chosen, dim)


def take_entries(x: Tensor, index: Tensor) -> Tensor:
    """Chosen entries of `x` (..., m, n) by their place in row-major order: (..., k)."""
    flat = x.flatten(-2)
    if index.ndim == 1:
        return flat.index_select(-1, index)
    return flat.expand(*index.shape[:-1], flat.shape[-1]).gather(-1, index)


def add_entries_(
    target: Tensor, index: Tensor, values: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """target <- beta * target, plus alpha * values on chosen entries, in place.

    `target` is (..., m, n), `index` (k) or (..., k) with distinct indices, `values` (..., k). A
    target that is not contiguous costs one full-size temporary.
    """
    if not target.is_contiguous():
        flat = target.contiguous()
        return target.copy_(add_entries_(flat, index, values, alpha=alpha, beta=beta))
    flat = target.view(*target.shape[:-2], -1)
    index = index.expand(*flat.shape[:-1], index.shape[-1])
    if beta == 0:
        chosen = alpha * values
        flat.zero_()
    else:
        chosen = flat.gather(-1, index).to(values.dtype).mul_(beta).add(values, alpha=alpha)
        if beta != 1:
            flat.mul_(beta)
    flat.scatter_(-1, index, chosen.to(flat.dtype).expand(index.shape))
    return target
