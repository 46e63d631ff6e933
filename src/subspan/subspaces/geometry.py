"""Geometry of the Grassmannian: angles between subspaces, and walking from one to another.

A point is a basis with orthonormal columns Q (..., d, r); a tangent H (..., d, r) satisfies
Qᵀ H = 0. Formulas follow "The Geometry of Algorithms with Orthogonality Constraints" (Edelman,
Arias, Smith, 1998, arXiv:physics/9806030).
"""

import torch
from torch import Tensor

from ..linalg.dtypes import common_dtype
from ..linalg.orthonormal import orthonormalise
from .bases import Dense, OneSided, Subspace


def _together(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = common_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The principal angles between two subspaces, ascending, in radians.

    Cosines are the singular values of Aᵀ B and sines those of B - A Aᵀ B; taking both keeps full
    accuracy for angles near 0, where cosines do not, and near pi/2 ("Numerical methods for
    computing angles between linear subspaces", Björck and Golub, 1973).

    Args:
        a: (..., d, r_a), orthonormal columns.
        b: (..., d, r_b), orthonormal columns.

    Returns:
        (..., min(r_a, r_b)), in [0, pi/2].

    Raises:
        ValueError: the columns have different lengths.
    """
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(
            f"a and b must have columns of one length, got {a.shape[-2]} and {b.shape[-2]}"
        )
    a, b = _together(a, b)
    if a.shape[-1] < b.shape[-1]:
        a, b = b, a
    inner = a.mT @ b
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(b - a @ inner).flip(-1)
    return torch.atan2(sines, cosines)


def horizontal(basis: Tensor, x: Tensor) -> Tensor:
    """The part of `x` (..., d, r) that is tangent at `basis`: x - Q (Qᵀ x)."""
    basis, x = _together(basis, x)
    return x - basis @ (basis.mT @ x)


def geodesic(
    basis: Tensor, tangent: Tensor, step: float | Tensor, *, rank: int | None = None
) -> Tensor:
    """Walk from `basis` along `tangent` for the time `step`: the exponential map.

        H = U S Vᵀ;   Q + (Q V (cos(step S) - I) + U sin(step S)) Vᵀ

    which is (Q V cos(step S) + U sin(step S)) Vᵀ for all of V. The distance walked is
    |step| ||H||_F as long as no angle step S exceeds pi/2. Orthonormality is kept up to rounding,
    which adds up over many steps.

    Args:
        basis: Q (..., d, r), orthonormal columns.
        tangent: H (..., d, r) with Qᵀ H = 0 (see `horizontal`).
        step: a number, or one per matrix (...).
        rank: walk along the leading `rank` singular directions of the tangent only; SubTrack++
            uses 1 ("SubTrack++: Gradient Subspace Tracking for Scalable LLM Training", 2025,
            arXiv:2502.01586). Also what to use for a tangent of known low rank and a large step,
            which would magnify the rounding errors in its other directions.

    Returns:
        (..., d, r), orthonormal columns.

    Raises:
        ValueError: `rank` is not between 1 and r.
    """
    if rank is not None and not 1 <= rank <= tangent.shape[-1]:
        raise ValueError(f"rank must be between 1 and {tangent.shape[-1]}, got {rank}")
    basis, tangent = _together(basis, tangent)
    left, values, right = torch.linalg.svd(tangent, full_matrices=False)
    left, values, right = left[..., :rank], values[..., :rank], right[..., :rank, :]
    if isinstance(step, Tensor):
        step = step.to(values.dtype).unsqueeze(-1)
    # cos(x) - 1 = -2 sin(x / 2)²: no cancellation for short steps.
    turn = -2 * torch.sin(values * step / 2).square()
    moved = basis @ right.mT * turn.unsqueeze(-2) + left * torch.sin(values * step).unsqueeze(-2)
    walked: Tensor = basis + moved @ right
    return walked


def procrustes(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal R that minimises ||source R - target||_F.

    Args:
        source: (..., d, r).
        target: (..., d, r).

    Returns:
        R = U Vᵀ (..., r, r) from the SVD of sourceᵀ target ("A generalized solution of the
        orthogonal Procrustes problem", Schönemann, 1966).
    """
    source, target = _together(source, target)
    left, _, right = torch.linalg.svd(source.mT @ target)
    rotation: Tensor = left @ right
    return rotation


def align_signs(basis: Tensor, reference: Tensor) -> Tensor:
    """`basis` (..., d, r) with columns negated so that each has a product >= 0 with `reference`.

    Singular vectors are defined up to sign only; this keeps coordinates comparable when a basis is
    found again. Columns orthogonal to their reference stay as they are.
    """
    basis, reference = _together(basis, reference)
    products = (basis * reference).sum(-2, keepdim=True)
    return basis * torch.where(products < 0, -1.0, 1.0)


def captured_energy(x: Tensor, subspace: Subspace) -> Tensor:
    """||project(x)||_F² / ||x||_F², the share of `x` (..., m, n) inside a subspace: shape (...).

    A one-sided basis that is not orthonormal is made so first. Of a zero matrix nothing is missed:
    the share is 1.

    Raises:
        TypeError: a two-sided basis is not orthonormal.
    """
    if not subspace.orthonormal:
        if not isinstance(subspace, OneSided):
            raise TypeError("captured_energy needs a subspace with an orthonormal basis")
        subspace = Dense(subspace.side, orthonormalise(subspace.dense()))
    c = subspace.project(x)
    # Norms in float64: squares of tiny gradients underflow in float32.
    modes = len(getattr(subspace, "factors", (0, 0)))  # a Tucker subspace has one per dimension
    every = tuple(range(-modes, 0))
    whole = torch.linalg.vector_norm(x, dim=every, dtype=torch.float64)
    dims = tuple(range(-len(subspace.coordinate_shape(*x.shape[-modes:])), 0))
    inside = torch.linalg.vector_norm(c, dim=dims, dtype=torch.float64)
    share = torch.where(whole > 0, inside / whole, 1.0).square()
    return share.clamp(max=1.0).to(c.dtype)
