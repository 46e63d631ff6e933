"""Leading singular bases of a matrix: exact, and by randomised subspace iteration."""

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .orthonormal import divisor, orthonormalise
from .products import add_product_
from .shapes import Side, check_matrix, check_rank, check_side, side_size

Method = Literal["auto", "svd", "gram"]

_LONG = 1.5
"""Ratio of the sides from which a square matrix of the short side is worth making first: the
triangle of a QR in exact decompositions, else the Gram matrix in float64."""

_PIECE = 1 << 16
"""Elements of a matrix that are in float64 at once, or a square of its short side."""

_ZERO_VALUE = 1e-7
"""Relative size below which a singular value from a float64 Gram matrix is rounding."""


def _owned(x: Tensor) -> Tensor:
    """A contiguous copy, so that keeping a few columns does not keep the whole factor alive."""
    return x.clone(memory_format=torch.contiguous_format)


def _complete(basis: Tensor, rank: int) -> Tensor:
    """The first `rank` columns, with orthonormal ones added when there are fewer."""
    missing = rank - basis.shape[-1]
    if missing <= 0:
        return _owned(basis[..., :rank])
    return orthonormalise(torch.nn.functional.pad(basis, (0, missing)))


@overload
def top_basis(
    x: Tensor,
    rank: int,
    *,
    side: Side,
    method: Method = "auto",
    return_values: Literal[False] = False,
) -> Tensor: ...


@overload
def top_basis(
    x: Tensor, rank: int, *, side: Side, method: Method = "auto", return_values: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def top_basis(
    x: Tensor,
    rank: int,
    *,
    side: Side,
    method: Method = "auto",
    return_values: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The singular vectors of the `rank` largest singular values of `x`, in decreasing order.

    Args:
        x: (..., m, n).
        rank: number of columns r, at most m (left) or n (right). Beyond min(m, n) the basis is
            completed with orthonormal columns of singular value 0.
        side: "left" for a basis of R^m, "right" for R^n.
        method: "svd", or "gram" for the eigenvectors of the smaller of x xᵀ and xᵀ x. The Gram
            matrix of float32 input is formed in float64: squared singular values keep their digits.
            "auto" takes "gram" for float32 on a GPU or when one side is 1.5 times the other, else
            "svd".
        return_values: also return the singular values.

    Returns:
        The basis, (..., m, r) or (..., n, r), owning only its own memory; with `return_values` the
        pair of it and the values (..., r).

    Raises:
        ValueError: `rank`, `side` or `method` is not allowed.
    """
    check_matrix("x", x)
    check_side(side)
    check_rank(rank, side_size(x, side))
    if method not in get_args(Method):
        raise ValueError(f'method must be "auto", "svd" or "gram", got {method!r}')
    work = x.to(compute_dtype(x.dtype))
    if method == "auto":
        cheaper = x.is_cuda or _is_long(x)
        method = "gram" if cheaper and work.dtype == torch.float32 else "svd"
    if method == "gram":
        basis, values = _gram_basis(work, rank, side)
    else:
        basis, values = _svd_basis(work, side)
    basis = _complete(basis, rank)
    if not return_values:
        return basis
    missing = max(rank - values.shape[-1], 0)
    return basis, _owned(torch.nn.functional.pad(values[..., :rank], (0, missing)))


def top_bases(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left and right singular vectors from one SVD, so that their signs match.

    Args:
        x: (..., m, n).
        rank: number of columns r, at most min(m, n).

    Returns:
        U (..., m, r) and V (..., n, r), each owning only its own memory.

    Raises:
        ValueError: `rank` is not between 1 and min(m, n).
    """
    check_matrix("x", x)
    check_rank(rank, min(x.shape[-2:]))
    left, _, right = torch.linalg.svd(x.to(compute_dtype(x.dtype)), full_matrices=False)
    return _owned(left[..., :rank]), _owned(right.mT[..., :rank])


def _svd_basis(x: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """All singular vectors on a side, and the values.

    Those on the short side of a long matrix are those of its QR's triangle: an SVD of that has no
    vectors on the long side to make, and so takes about half the time and memory.
    """
    tall, on_short_side = _tall(x, side)
    if on_short_side and _is_long(x):
        triangle = torch.linalg.qr(tall, mode="r").R
        x = triangle if side == "right" else triangle.mT
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    return left if side == "left" else right.mT, values


def _gram_basis(x: Tensor, rank: int, side: Side) -> tuple[Tensor, Tensor]:
    """As `top_basis`, from the eigenvectors of the smaller Gram matrix in float64."""
    tall, on_short_side = _tall(x, side)
    scale = _scale(tall)
    # A float64 copy of the whole matrix would be the largest temporary of a refresh.
    pieces = tall.split(max(tall.shape[-1], _PIECE // tall.shape[-1]), dim=-2)
    gram = tall.new_zeros((*tall.shape[:-2], *[tall.shape[-1]] * 2), dtype=torch.float64)
    for piece in pieces:
        exact = (piece / scale).double()
        add_product_(gram, exact.mT, exact)
    del exact
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(-1).clamp(min=0).sqrt().to(x.dtype) * scale.squeeze(-1)
    short = vectors[..., -rank:].flip(-1)
    if on_short_side:
        return short.to(x.dtype), values
    # Products with different singular vectors are orthogonal up to rounding; directions of
    # singular value zero have no image and are completed here.
    image = torch.cat([(piece / scale).double() @ short for piece in pieces], dim=-2)
    length = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    image = torch.where(length > _ZERO_VALUE * length.amax(-1, keepdim=True), image, 0.0)
    return orthonormalise(image).to(x.dtype), values


def sketched_basis(
    x: Tensor,
    rank: int,
    *,
    side: Side,
    sketch: Tensor,
    power_iterations: int = 1,
    rotate: bool = True,
) -> Tensor:
    """An approximate leading singular basis by randomised subspace iteration.

    With A the tall orientation of `x`, a test matrix Z (the sketch, or Aᵀ times it when the basis
    is wanted on the long side) is improved by Z <- orth(Aᵀ (A Z)), one round more than
    `power_iterations`; then the k x k matrix (A Z)ᵀ (A Z) is diagonalised. Orthonormalisation
    happens on the short side only. For a short side this is the accuracy of the published scheme
    with `power_iterations` rounds, whose factor B = Qᵀ x already holds the last product.

    Args:
        x: (..., m, n).
        rank: number of columns r of the result.
        side: "left" for a basis of R^m, "right" for R^n.
        sketch: (..., d, k), k >= r, d = m (left) or n (right): Gaussian columns, or a previous
            basis (a warm start), alone or with some Gaussian columns. Columns beyond min(m, n) are
            not used.
        power_iterations: rounds after the first; 0 is enough for a warm start, 1 for a Gaussian
            sketch with 8 columns more than `rank`.
        rotate: order the columns as approximate singular vectors, decreasing, and keep the best
            `rank`. Without it the first `rank` columns of the iterate span the result, which drops
            information when k > r; it saves a product and an eigendecomposition.

    Returns:
        (..., d, r), orthonormal, owning only its own memory.

    Raises:
        ValueError: `rank`, `side`, the shape of `sketch` or `power_iterations` is not allowed.

    References:
        "Finding structure with randomness: Probabilistic algorithms for constructing approximate
        matrix decompositions" (Halko, Martinsson, Tropp, 2011, arXiv:0909.4061).
    """
    check_matrix("x", x)
    check_side(side)
    size = side_size(x, side)
    check_rank(rank, size)
    if sketch.ndim < 2 or sketch.shape[-2] != size or sketch.shape[-1] < rank:
        raise ValueError(
            f"sketch must have shape (..., {size}, k) with k >= rank = {rank}, "
            f"got {tuple(sketch.shape)}"
        )
    if power_iterations < 0:
        raise ValueError(f"power_iterations must be at least 0, got {power_iterations}")
    work = x.to(compute_dtype(x.dtype))
    tall, on_short_side = _tall(work, side)
    iterate = sketch[..., : tall.shape[-1]].to(work.dtype)
    # Keeps squares of tiny gradients away from underflow; applied to products, never to x itself.
    shrink = 1.0 / _scale(tall)
    rounds = power_iterations + 1
    if not on_short_side:
        iterate = orthonormalise(tall.mT @ iterate)
        rounds -= 1
    for _ in range(rounds):
        iterate = orthonormalise(tall.mT @ (tall @ iterate).mul_(shrink))
    if on_short_side and not rotate:
        return _owned(iterate[..., :rank])
    image = (tall @ iterate).mul_(shrink)
    if rotate:
        _, vectors = torch.linalg.eigh(image.mT @ image)
        vectors = vectors.flip(-1)[..., :rank]
        if on_short_side:
            rotated: Tensor = iterate @ vectors
            return rotated
        image = image @ vectors
    return _complete(orthonormalise(image[..., :rank]), rank)


def _is_long(x: Tensor) -> bool:
    return max(x.shape[-2:]) >= _LONG * min(x.shape[-2:])


def _tall(x: Tensor, side: Side) -> tuple[Tensor, bool]:
    """`x` or its transpose with columns <= rows, and whether `side` is the one with the columns."""
    on_short_side = side_size(x, side) == min(x.shape[-2:])
    return (x if (side == "right") == on_short_side else x.mT), on_short_side


def _scale(x: Tensor) -> Tensor:
    """Largest absolute entry of each matrix, 1 for zero matrices: (..., 1, 1)."""
    # On a CPU the infinity norm takes ten times as long, and abs() would copy the matrix.
    dims = (-2, -1)
    return divisor(torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True)))
