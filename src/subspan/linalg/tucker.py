"""Products of a tensor with a matrix along each mode, and the factors of a Tucker decomposition.

The product x ×_i F of x (d_0, ..., d_{k-1}) with F (p, d_i) along mode i replaces every fibre v of
that mode by F v; products along different modes commute. With orthonormal factors F_i (d_i, r_i):

    core = x ×_0 F_0ᵀ ×_1 F_1ᵀ ...           x is close to core ×_0 F_0 ×_1 F_1 ...
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .dtypes import compute_dtype
from .factors import top_basis
from .products import add_product_, add_scaled_
from .shapes import broadcast_batch

Matrices = Sequence[Tensor | None]


def unfold(x: Tensor, mode: int, *, batch: int = 0) -> Tensor:
    """The matrices (..., d, rest) with the fibres of dimension `mode` of `x` as columns.

    The first `batch` dimensions stay as they are.
    """
    return x.movedim(mode, batch).reshape(*x.shape[:batch], x.shape[mode], -1)


def mode_product(x: Tensor, matrix: Tensor, mode: int, *, transposed: bool = False) -> Tensor:
    """The product of `x` with `matrix` along dimension `mode`, contiguous.

    Args:
        x: (..., q, ...).
        matrix: (p, q), or (q, p) when `transposed`; its leading dimensions, if any, are the first
            ones of `x`.
        mode: the dimension of size q; negative ones count from the end.
        transposed: multiply by the transpose of `matrix`.

    Returns:
        `x` with p in place of q.
    """
    matrix = matrix.mT if transposed else matrix
    mode, batch = mode % x.ndim, matrix.ndim - 2
    shape = list(x.shape)
    shape[mode] = matrix.shape[-2]
    if math.prod(shape[batch:mode]) == 1:
        return (matrix @ unfold(x, mode, batch=batch)).view(shape)
    # One large product of a rearranged copy is faster than many small ones.
    rows = x.movedim(mode, -1)
    flat = rows.reshape(*shape[:batch], -1, x.shape[mode]) @ matrix.mT
    return flat.view(*rows.shape[:-1], shape[mode]).movedim(-1, mode).contiguous()


def multi_mode_product(x: Tensor, matrices: Matrices, *, transposed: bool = False) -> Tensor:
    """The product of `x` with a matrix along each of its last modes, in the cheapest order.

    Args:
        x: (..., q_0, ..., q_{k-1}).
        matrices: for each mode (..., p_i, q_i), or (..., q_i, p_i) when `transposed`; None leaves
            the mode as it is. Leading dimensions broadcast with those of `x`.
        transposed: multiply by the transposes.

    Returns:
        (..., p_0, ..., p_{k-1}).
    """
    x, matrices = _broadcast(x, matrices)
    for mode, matrix in _cheapest_first(matrices, transposed):
        x = mode_product(x, matrix, mode, transposed=transposed)
    return x


def add_multi_mode_product_(
    target: Tensor, x: Tensor, matrices: Matrices, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """target <- beta * target + alpha * `multi_mode_product(x, matrices)`, in place.

    At least one of the matrices is not None. beta = 0 ignores what `target` held. A target that is
    not contiguous, or of another dtype than `x`, costs a temporary of its size.

    Raises:
        ValueError: `target` has another shape than the product.
    """
    x, matrices = _broadcast(x, matrices, target.shape[: target.ndim - len(matrices)])
    *first, (mode, matrix) = _cheapest_first(matrices, False)
    for earlier, factor in first:
        x = mode_product(x, factor, earlier)
    mode, batch, (p, q) = mode % x.ndim, x.shape[: matrix.ndim - 2], matrix.shape[-2:]
    shape = (*x.shape[:mode], p, *x.shape[mode + 1 :])
    if target.shape != shape:
        raise ValueError(f"target must have shape {shape}, got {tuple(target.shape)}")
    if target.dtype != x.dtype or not target.is_contiguous():
        return add_scaled_(target, mode_product(x, matrix, mode), alpha=alpha, beta=beta)
    before, after = math.prod(shape[len(batch) : mode]), math.prod(shape[mode + 1 :])
    view: tuple[int, ...] = (before, p, after)
    if after == 1:
        view, a, b = (before, p), x.reshape(*batch, before, q), matrix.mT
    elif before == 1:
        view, a, b = (p, after), matrix, x.reshape(*batch, q, after)
    else:
        a, b = matrix.unsqueeze(-3), x.reshape(*batch, before, q, after)
    add_product_(target.view(*batch, *view), a, b, alpha=alpha, beta=beta)
    return target


def tucker_factors(
    x: Tensor,
    ranks: tuple[int | None, ...],
    *,
    iterations: int = 3,
    initial: Matrices | None = None,
) -> tuple[Tensor | None, ...]:
    """Orthonormal factors F_i (..., d_i, r_i) that give the core a large norm.

    The start is the higher-order singular value decomposition: F_i holds the leading left singular
    vectors of the unfolding of x along mode i. In a sweep each factor in turn becomes that of x
    projected along all other modes (higher-order orthogonal iteration), so the norm of the core
    never falls. The start already recovers a tensor of multilinear rank `ranks`; for others the
    sweeps approach a stationary point, not always the best one.

    Args:
        x: (..., d_0, ..., d_{k-1}) with k = len(ranks).
        ranks: r_i <= d_i for each of the last modes; None leaves a mode as it is.
        iterations: sweeps. COAP's first basis is that of three.
        initial: orthonormal factors to start from, such as the previous ones; None in a place, or
            for all, starts as above.

    Returns:
        For each mode its factor, columns by decreasing singular value, or None without a rank.

    Raises:
        ValueError: the number of ranks, a rank, `iterations` or the length of `initial` is not
            allowed.

    References:
        "A multilinear singular value decomposition" and "On the best rank-1 and rank-(R1, R2, ...,
        RN) approximation of higher-order tensors" (De Lathauwer, De Moor, Vandewalle, 2000).
    """
    if not 1 <= len(ranks) <= x.ndim:
        raise ValueError(f"ranks must be those of 1 to {x.ndim} modes of x, got {ranks}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    initial = [None] * len(ranks) if initial is None else initial
    if len(initial) != len(ranks):
        raise ValueError(f"initial must have one entry for each of {ranks}, got {len(initial)}")
    work, batch = x.to(compute_dtype(x.dtype)), x.ndim - len(ranks)
    rank_of = {mode: rank for mode, rank in enumerate(ranks) if rank is not None}
    factors: list[Tensor | None] = [None] * len(ranks)

    def leading(y: Tensor, mode: int) -> Tensor:
        return top_basis(unfold(y, batch + mode, batch=batch), rank_of[mode], side="left")

    # A sweep replaces the first factor before it reads it.
    for mode in list(rank_of)[min(iterations, 1) :]:
        given = initial[mode]
        factors[mode] = leading(work, mode) if given is None else given.to(work.dtype)
    # With a single factor one sweep is exact.
    for _ in range(iterations if len(rank_of) > 1 else min(iterations, 1)):
        projected = work  # along the modes before the current one
        for mode in rank_of:
            later = [None if other <= mode else factor for other, factor in enumerate(factors)]
            found = leading(multi_mode_product(projected, later, transposed=True), mode)
            factors[mode] = found
            projected = mode_product(projected, found, batch + mode, transposed=True)
    return tuple(factors)


def _cheapest_first(matrices: Matrices, transposed: bool) -> list[tuple[int, Tensor]]:
    """The matrices with their modes, counted from the end, in the order of fewest operations.

    A product from size q to p costs p times the entries of the tensor and multiplies their number
    by p / q. Exchanging neighbours in the order shows that increasing 1/q - 1/p is best. Of equals,
    the one along the first mode, whose product needs no copy, meets the large tensor.
    """
    held = [
        (mode - len(matrices), matrix) for mode, matrix in enumerate(matrices) if matrix is not None
    ]
    held.sort(key=lambda entry: 1 / entry[1].shape[-2] - 1 / entry[1].shape[-1])
    return held if transposed else held[::-1]


def _broadcast(
    x: Tensor, matrices: Matrices, batch: Sequence[int] | None = None
) -> tuple[Tensor, Matrices]:
    """`x` and those matrices that have leading dimensions, expanded to common ones."""
    own = x.ndim - len(matrices)
    batched = [matrix for matrix in matrices if matrix is not None and matrix.ndim > 2]
    if batch is None:
        batch = broadcast_batch(x.shape[:own], *(matrix.shape[:-2] for matrix in batched))
    return x.expand(*batch, *x.shape[own:]), [
        matrix if matrix is None or matrix.ndim == 2 else matrix.expand(*batch, *matrix.shape[-2:])
        for matrix in matrices
    ]
