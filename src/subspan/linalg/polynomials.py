"""Preconditioners that are polynomials of a matrix: products and traces, no decomposition.

Doikov, Rodomanov: Polynomial Preconditioning for Gradient Methods, 2023, arXiv 2301.13194.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .products import add_symmetric_product_

Product = Callable[[Tensor], Tensor]
# A^16 bounds the largest eigenvalue of a k x k matrix up to a factor of k^(1/32).
_SQUARINGS = 4


def symmetric_preconditioner(curvature: Tensor, degree: int) -> Tensor:
    """P_degree of symmetric matrices `(..., k, k)`, by products and traces alone.

        P_0 = I;  P_i = e_i I - B P_{i-1},  e_i = tr(B P_{i-1}) / i

    P_1 = tr(B) I - B; P_{k-1} = det(B) B^-1; on an eigenvector of B, the elementary symmetric
    polynomial of that degree in all other eigenvalues. (Newton's identities in the order of
    Faddeev and Le Verrier.)
    """
    found = torch.empty_like(curvature)
    return _recursion(curvature, degree, found, torch.empty_like(found))[0]


def scaled_preconditioner(curvature: Tensor, degree: int, scratch: Tensor | None = None) -> Tensor:
    """`P / lambda_max(P B)` with P of `symmetric_preconditioner`.

    lambda_max is bounded from above, see `largest_eigenvalue`. The degree is at most k - 1: beyond
    it P is 0. B must have a rank above the degree, or P B is 0. Where B is 0, so is the result.

    Args:
        curvature: B, `(..., k, k)`.
        degree: of P.
        scratch: memory `(3, ..., k, k)`, of which the result is a part; None allocates it.
    """
    size = trace(curvature).clamp(min=_tiny(curvature))
    # Three of their own where none are given, so that the result keeps no more than itself alive.
    memory = [torch.empty_like(curvature) for _ in range(3)] if scratch is None else scratch
    unit, found, spare = memory
    torch.div(curvature, size, out=unit)
    degree = min(degree, curvature.shape[-1] - 1)
    found, image = _recursion(unit, degree, found, spare)
    add_symmetric_product_(image, unit, found, beta=0.0)
    largest = _power_bound(image, unit) * size
    return found.mul_(torch.where(largest > _tiny(curvature), largest.reciprocal(), 0.0))


def largest_eigenvalue(x: Tensor) -> Tensor:
    """An upper bound of the largest eigenvalue of positive semidefinite `(..., k, k)`.

        ||A^16||_F^(1/16),  at most k^(1/32) times the eigenvalue

    Returns:
        (..., 1, 1).
    """
    return _power_bound(x.clone(), torch.empty_like(x))


def conjugate_gradients(product: Product, target: Tensor, steps: int) -> Tensor:
    """The minimiser of `<B h, h>/2 - <target, h>` over the span of target, ..., B^(steps-1) target.

    Args:
        product: multiplies with B, positive semidefinite.
        target: `(k,)`, or `(..., m, n)`, one problem per matrix.
        steps: dimension of that span.
    """
    dims = (-2, -1) if target.dim() > 1 else (-1,)
    found, residual = torch.zeros_like(target), target
    direction, size = residual, _dot(residual, residual, dims)
    # What is left at that size is rounding, which another step would only amplify.
    floor = size * (10 * torch.finfo(target.dtype).eps) ** 2
    for _ in range(steps):
        image = product(direction)
        curvature = _dot(direction, image, dims)
        useful = (size > floor) & (curvature > 0)
        length = torch.where(useful, size / curvature, 0.0)
        found.addcmul_(length, direction)
        residual = residual - length * image
        before, size = size, _dot(residual, residual, dims)
        direction = residual + torch.where(useful, size / before, 0.0) * direction
    return found


def trace(x: Tensor) -> Tensor:
    """Traces of `(..., k, k)` as `(..., 1, 1)`."""
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _recursion(
    curvature: Tensor, degree: int, found: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """P_degree in one of two buffers, and the other one."""
    if degree == 0:
        found.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return found, spare
    torch.neg(curvature, out=found)
    for order in range(1, degree + 1):
        if order > 1:
            add_symmetric_product_(spare, curvature, found, alpha=-1.0, beta=0.0)
            found, spare = spare, found
        diagonal = found.diagonal(dim1=-2, dim2=-1)
        diagonal.sub_(diagonal.sum(-1, keepdim=True) / order)
    return found, spare


def _power_bound(x: Tensor, spare: Tensor) -> Tensor:
    """See `largest_eigenvalue`; overwrites both."""
    logarithm = x.new_zeros(())
    for order in range(_SQUARINGS + 1):
        norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=_tiny(x))
        logarithm = logarithm + norm.log() / 2**order
        if order < _SQUARINGS:
            x.div_(norm)
            add_symmetric_product_(spare, x, x, beta=0.0)
            x, spare = spare, x
    return logarithm.exp()


def _dot(x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x * y).sum(dims, keepdim=True)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
