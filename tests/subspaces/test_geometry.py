"""Angles, geodesics and alignments against constructions whose answer is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.subspaces import (
    Coordinates,
    Dense,
    Entries,
    TwoSided,
    Whole,
    align_signs,
    captured_energy,
    geodesic,
    horizontal,
    principal_angles,
    procrustes,
)

DOUBLE = torch.float64
seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(0, 8), st.integers(1, 5)).map(lambda s: (s[0] + s[1], s[1]))


def close(a: Tensor, b: Tensor, atol: float = 0.0, rtol: float = 0.0) -> bool:
    """torch.allclose without its default relative tolerance, which would hide float32 errors."""
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def orthonormal(seed: int, *shape: int) -> Tensor:
    return torch.linalg.qr(normal(seed, *shape))[0]


def gram_error(basis: Tensor) -> float:
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return float((basis.mT @ basis - identity).abs().amax())


def rotated_by(seed: int, d: int, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Two bases of R^d with the given principal angles, in mixed-up columns."""
    r = angles.shape[0]
    frame = orthonormal(seed, d, 2 * r)
    a = frame[:, :r]
    b = a * torch.cos(angles) + frame[:, r:] * torch.sin(angles)
    return a @ orthonormal(seed + 1, r, r), b @ orthonormal(seed + 2, r, r)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, math.pi / 2), min_size=1, max_size=4), st.integers(0, 5), seeds)
def test_principal_angles_of_known_rotations(angles: list[float], extra: int, seed: int) -> None:
    expected = torch.tensor(sorted(angles), dtype=DOUBLE)
    a, b = rotated_by(seed, 2 * len(angles) + extra, expected)
    assert close(principal_angles(a, b), expected, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-4, 1e-8, 1e-12])
def test_small_angles_keep_their_relative_accuracy(angle: float) -> None:
    a, b = rotated_by(0, 6, torch.tensor([angle, 1.0], dtype=DOUBLE))
    assert float(principal_angles(a, b)[0]) == pytest.approx(angle, rel=1e-2)


def test_angles_to_a_contained_or_orthogonal_subspace() -> None:
    basis = orthonormal(0, 6, 5)
    zero, right = torch.zeros(2, dtype=DOUBLE), torch.full((2,), math.pi / 2, dtype=DOUBLE)
    assert close(principal_angles(basis, basis[:, 1:3]), zero, atol=1e-12)
    assert close(principal_angles(basis[:, 1:3], basis), zero, atol=1e-12)
    assert close(principal_angles(basis[:, :2], basis[:, 2:4]), right, atol=1e-12)
    batch = principal_angles(basis.expand(3, 6, 5), basis[:, :2])
    assert batch.shape == (3, 2)
    with pytest.raises(ValueError, match="columns of one length, got 6 and 4"):
        principal_angles(basis, torch.eye(4))


@settings(deadline=None, max_examples=50)
@given(sizes, seeds)
def test_horizontal_is_the_tangent_part(size: tuple[int, int], seed: int) -> None:
    basis, x = orthonormal(seed, *size), normal(seed + 1, *size)
    tangent = horizontal(basis, x)
    zero = torch.zeros((), dtype=DOUBLE)
    assert close(basis.mT @ tangent, zero, atol=1e-12)
    assert close(horizontal(basis, tangent), tangent, atol=1e-12)
    assert close(basis @ (basis.mT @ (x - tangent)), x - tangent, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(sizes, seeds, st.floats(-30, 30))
def test_geodesic_stays_orthonormal_and_starts_at_the_basis(
    size: tuple[int, int], seed: int, step: float
) -> None:
    basis = orthonormal(seed, *size)
    tangent = horizontal(basis, normal(seed + 1, *size))
    assert torch.equal(geodesic(basis, tangent, 0.0), basis)
    # In a space without room for a full tangent, rounding in its zero directions is all there is.
    tangent = torch.where(tangent.norm() > 1e-10, tangent, 0.0)
    rank = max(1, min(size[1], size[0] - size[1]))
    assert gram_error(geodesic(basis, tangent, step, rank=rank)) < 1e-10


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 4), seeds, st.floats(0.01, 1.0))
def test_geodesic_walks_the_distance_step_times_norm(
    rank: int, extra: int, seed: int, share: float
) -> None:
    basis = orthonormal(seed, 2 * rank + extra, rank)
    tangent = horizontal(basis, normal(seed + 1, 2 * rank + extra, rank))
    # The largest angle stays below pi / 2, where the shortest path is still this one.
    step = share * 1.5 / float(torch.linalg.matrix_norm(tangent, ord=2))
    walked = principal_angles(basis, geodesic(basis, tangent, step)).norm()
    assert float(walked) == pytest.approx(step * float(tangent.norm()), rel=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), seeds, st.floats(-2, 2))
def test_rank_one_geodesic_is_the_published_rank_one_update(
    rank: int, seed: int, step: float
) -> None:
    basis = orthonormal(seed, rank + 5, rank)
    u = horizontal(basis, normal(seed + 1, rank + 5, 1))
    u, v = u / u.norm(), torch.nn.functional.normalize(normal(seed + 2, rank, 1), dim=0)
    value = 1.7
    angle = step * value
    expected = basis + (basis @ v * (math.cos(angle) - 1) + u * math.sin(angle)) @ v.mT
    tangent = value * u @ v.mT
    assert close(geodesic(basis, tangent, step), expected, atol=1e-12)
    assert close(geodesic(basis, tangent, step, rank=1), expected, atol=1e-12)


def test_geodesic_solves_its_differential_equation() -> None:
    # Q'' + Q (Q'ᵀ Q') = 0 along a geodesic, checked by central differences.
    basis = orthonormal(0, 9, 3)
    tangent = horizontal(basis, normal(1, 9, 3))
    h = 1e-4
    before, now, after = (geodesic(basis, tangent, 0.3 + k * h) for k in (-1, 0, 1))
    velocity, acceleration = (after - before) / (2 * h), (after - 2 * now + before) / h**2
    residual = acceleration + now @ (velocity.mT @ velocity)
    assert float(residual.abs().max()) < 1e-4


def test_truncated_geodesic_survives_a_huge_step_in_float32() -> None:
    basis = orthonormal(2, 40, 6).float()
    u = horizontal(basis, normal(3, 40, 1).float())
    tangent = u @ normal(4, 1, 6).float()
    assert gram_error(geodesic(basis, tangent, 1e4, rank=1)) < 1e-5


def test_batched_geodesic_takes_one_step_size_per_matrix() -> None:
    basis = orthonormal(5, 2, 7, 3)
    tangent = horizontal(basis, normal(6, 2, 7, 3))
    steps = torch.tensor([0.2, -1.0])
    walked = geodesic(basis, tangent, steps, rank=2)
    for i in range(2):
        single = geodesic(basis[i], tangent[i], float(steps[i]), rank=2)
        assert close(walked[i], single, atol=1e-6)
    with pytest.raises(ValueError, match="rank must be between 1 and 3, got 4"):
        geodesic(basis, tangent, 0.1, rank=4)


@settings(deadline=None, max_examples=50)
@given(sizes, seeds)
def test_procrustes_recovers_a_rotation(size: tuple[int, int], seed: int) -> None:
    source, rotation = orthonormal(seed, *size), orthonormal(seed + 1, size[1], size[1])
    found = procrustes(source, source @ rotation)
    assert close(found, rotation, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(sizes, seeds)
def test_procrustes_is_orthogonal_and_at_least_as_good_as_others(
    size: tuple[int, int], seed: int
) -> None:
    source, target = normal(seed, *size), normal(seed + 1, *size)
    found = procrustes(source, target)
    assert gram_error(found) < 1e-10
    best = float((source @ found - target).norm())
    for other in range(5):
        rival = orthonormal(seed + 2 + other, size[1], size[1])
        assert best <= float((source @ rival - target).norm()) + 1e-9


@settings(deadline=None, max_examples=50)
@given(sizes, seeds, st.integers(0, 31))
def test_align_signs_undoes_sign_flips(size: tuple[int, int], seed: int, mask: int) -> None:
    basis = orthonormal(seed, *size)
    flips = torch.tensor([-1.0 if mask >> k & 1 else 1.0 for k in range(size[1])], dtype=DOUBLE)
    assert torch.equal(align_signs(basis * flips, basis), basis)
    aligned = align_signs(basis, normal(seed + 1, *size))
    assert torch.equal(aligned.abs(), basis.abs())
    assert bool(((aligned * normal(seed + 1, *size)).sum(0) >= 0).all())


def test_align_signs_leaves_orthogonal_columns_alone() -> None:
    basis = torch.eye(4, dtype=DOUBLE)
    assert torch.equal(align_signs(-basis[:, :2], basis[:, 2:]), -basis[:, :2])


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 7), st.integers(1, 6), st.data())
def test_captured_energy_is_what_the_residual_lacks(
    seed: int, m: int, n: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    x = normal(seed, 2, m, n)
    total = x.square().sum((-2, -1))
    for subspace in (
        Dense("left", orthonormal(seed + 1, m, rank)),
        Dense("right", orthonormal(seed + 2, 2, n, rank)),
        TwoSided(orthonormal(seed + 3, m, rank), orthonormal(seed + 4, n, rank)),
        Coordinates("right", torch.arange(rank), n),
        Entries(torch.arange(rank), (m, n)),
        Whole(),
    ):
        expected = 1 - subspace.residual(x).square().sum((-2, -1)) / total
        found = captured_energy(x, subspace)
        assert found.shape == (2,)
        assert close(found, expected, atol=1e-10)


def test_captured_energy_of_awkward_matrices() -> None:
    basis = orthonormal(0, 6, 2)
    subspace = Dense("left", basis)
    assert float(captured_energy(torch.zeros(6, 3), subspace)) == 1.0
    tiny = (basis @ normal(1, 2, 3)).float() * 1e-30
    assert float(captured_energy(tiny, subspace)) == pytest.approx(1.0, abs=1e-5)
    x = normal(2, 6, 3).bfloat16()
    assert captured_energy(x, subspace).dtype == DOUBLE
    skewed = Dense("left", basis @ normal(3, 2, 2), orthonormal=False)
    expected = captured_energy(normal(2, 6, 3), subspace)
    assert close(captured_energy(normal(2, 6, 3), skewed), expected, atol=1e-10)
    with pytest.raises(TypeError, match="orthonormal"):
        captured_energy(x, TwoSided(torch.eye(6), torch.eye(3), orthonormal=False))
