"""Exact and sketched singular bases against the projectors of a full SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.linalg import sketched_basis, top_bases, top_basis
from subspan.linalg.shapes import Side

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
seeds = st.integers(0, 2**31)
sides = st.sampled_from(["left", "right"])


def close(a: Tensor, b: Tensor, atol: float = 0.0, rtol: float = 0.0) -> bool:
    """torch.allclose without its default relative tolerance, which would hide float32 errors."""
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(seed: int, m: int, n: int, values: Tensor) -> Tensor:
    """A matrix with given singular values and random singular vectors."""
    k = values.shape[0]
    left = torch.linalg.qr(normal(seed, m, k))[0]
    right = torch.linalg.qr(normal(seed + 1, n, k))[0]
    return left * values.to(torch.float64) @ right.mT


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def gram_error(basis: Tensor) -> float:
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return float((basis.mT @ basis - identity).abs().amax())


def energy(x: Tensor, basis: Tensor, side: Side) -> Tensor:
    return ((basis.mT @ x) if side == "left" else (x @ basis)).square().sum((-2, -1))


@settings(deadline=None, max_examples=60)
@given(shapes, seeds, sides, st.sampled_from(["auto", "svd", "gram"]), st.data())
def test_top_basis_spans_the_leading_singular_vectors(
    shape: tuple[int, int], seed: int, side: Side, method: str, data: st.DataObject
) -> None:
    m, n = shape
    rank = data.draw(st.integers(1, min(m, n)))
    x = with_spectrum(seed, m, n, torch.arange(min(m, n), 0, -1))
    basis, values = top_basis(x, rank, side=side, method=method, return_values=True)
    assert gram_error(basis) < 1e-12
    # Reference: the dominant eigenvectors of the side's own Gram matrix.
    gram = x @ x.mT if side == "left" else x.mT @ x
    expected = torch.linalg.eigh(gram)[1][:, -rank:]
    assert close(projector(basis), projector(expected), atol=1e-9)
    assert close(values, torch.arange(min(m, n), 0, -1, dtype=x.dtype)[:rank], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(shapes, seeds, sides, st.sampled_from(["svd", "gram"]))
def test_columns_come_in_decreasing_order(
    shape: tuple[int, int], seed: int, side: Side, method: str
) -> None:
    x = normal(seed, *shape)
    basis = top_basis(x, min(shape), side=side, method=method)
    per_column = (basis.mT @ x if side == "left" else (x @ basis).mT).norm(dim=-1)
    assert close(per_column, torch.linalg.svdvals(x), atol=1e-9)


AWKWARD = {
    "zero": torch.zeros(6, 9, dtype=torch.float64),
    "rank one": normal(0, 6, 1) @ normal(1, 1, 9),
    "identity": torch.eye(6, 9, dtype=torch.float64),
    "tiny": normal(2, 6, 9) * 1e-30,
    "one row": normal(3, 1, 9),
    "non-contiguous": normal(4, 9, 6).mT,
}


@pytest.mark.parametrize("method", ["auto", "svd", "gram"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_awkward_matrices_give_orthonormal_bases_of_full_energy(
    kind: str, side: Side, method: str, dtype: torch.dtype
) -> None:
    x = AWKWARD[kind].to(dtype)
    size = x.shape[0] if side == "left" else x.shape[1]
    rank = min(size, 7)
    basis = top_basis(x, rank, side=side, method=method)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert basis.shape == (size, rank)
    assert gram_error(basis) < (1e-12 if dtype == torch.float64 else 5e-6)
    x, basis = x.double() * (1e30 if kind == "tiny" else 1.0), basis.double()
    assert close(energy(x, basis, side), x.square().sum(), rtol=1e-5)


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_small_singular_values_are_resolved_in_float32(side: Side, method: str) -> None:
    # A Gram matrix in float32 would lose everything below 3e-4 of the largest value.
    values = torch.tensor([1.0, 1e-2, 1e-4, 1e-5])
    x = with_spectrum(5, 30, 12, values).float()
    basis, found = top_basis(x, 3, side=side, method=method, return_values=True)
    assert close(found, values[:3], rtol=2e-2)
    exact = torch.linalg.svd(x.double())
    expected = exact[0][:, :3] if side == "left" else exact[2][:3].mT
    assert close(projector(basis.double()), projector(expected), atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gram_matrix_summed_in_pieces_gives_the_vectors_of_an_svd(side: Side) -> None:
    # 40 columns are summed 1 638 rows at a time.
    x = torch.stack([with_spectrum(seed, 20_000, 40, torch.arange(40, 0, -1)) for seed in (1, 9)])
    x = x if side == "right" else x.mT
    found, values = top_basis(x.float(), 7, side=side, method="gram", return_values=True)
    other = top_basis(x.float(), 7, side="left" if side == "right" else "right", method="gram")
    exact = torch.linalg.svd(x, full_matrices=False)
    left, right = exact[0][..., :7], exact[2][..., :7, :].mT
    short, long = (right, left) if side == "right" else (left, right)
    assert close(values, exact[1][..., :7].float(), rtol=1e-6)
    for basis, expected in ((found, short), (other, long)):
        cosines = (basis.double() * expected).sum(-2).abs()
        assert close(cosines, torch.ones_like(cosines), atol=1e-6)


def test_results_own_only_their_memory() -> None:
    x = normal(6, 10, 10)
    sketch = normal(7, 10, 4)
    bases = [top_basis(x, 2, side=s, method=m) for s in ("left", "right") for m in ("svd", "gram")]
    bases += top_bases(x, 2)
    bases += [sketched_basis(x, 2, side="left", sketch=sketch, rotate=r) for r in (True, False)]
    bases += [sketched_basis(x[:4], 2, side="right", sketch=sketch, rotate=False)]
    for basis in bases:
        assert basis.untyped_storage().nbytes() == 10 * 2 * 8


@settings(deadline=None, max_examples=25)
@given(shapes, seeds, st.data())
def test_top_bases_belong_to_the_same_singular_triples(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(shape)))
    x = normal(seed, *shape)
    left, right = top_bases(x, rank)
    core = left.mT @ x @ right
    assert close(core, torch.diag(torch.linalg.svdvals(x)[:rank]), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(shapes, seeds, sides, st.booleans(), st.data())
def test_sketch_of_an_exactly_low_rank_matrix_is_exact(
    shape: tuple[int, int], seed: int, side: Side, rotate: bool, data: st.DataObject
) -> None:
    m, n = shape
    rank = data.draw(st.integers(1, min(m, n)))
    x = with_spectrum(seed, m, n, torch.arange(rank, 0, -1))
    size = m if side == "left" else n
    extra = data.draw(st.integers(0, 3))
    sketch = normal(seed + 2, size, rank if not rotate else rank + extra)
    basis = sketched_basis(x, rank, side=side, sketch=sketch, rotate=rotate)
    assert gram_error(basis) < 1e-10
    assert close(energy(x, basis, side), x.square().sum(), rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(120, 120), (200, 80), (80, 200)])
@pytest.mark.parametrize(
    "spectrum", ["geometric", "harmonic", "signal over a flat tail", "two levels"]
)
def test_one_power_iteration_captures_the_leading_energy(
    spectrum: str, shape: tuple[int, int], side: Side
) -> None:
    index = torch.arange(80.0)
    values = {
        "geometric": 0.9**index,
        "harmonic": 1 / (1 + index),
        "signal over a flat tail": torch.where(index < 12, (1 + index) ** -0.5, 0.05),
        "two levels": torch.where(index < 16, 1.0, 0.1),
    }[spectrum]
    x = with_spectrum(8, *shape, values).float()
    size = shape[0] if side == "left" else shape[1]
    basis = sketched_basis(x, 20, side=side, sketch=normal(9, size, 28))
    best = values[:20].square().sum()
    assert energy(x, basis, side) >= 0.995 * best
    assert gram_error(basis) < 5e-6


@pytest.mark.parametrize("shape", [(30, 30), (40, 20), (20, 40)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rotated_columns_approximate_ordered_singular_vectors(
    shape: tuple[int, int], side: Side
) -> None:
    x = with_spectrum(10, *shape, 0.5 ** torch.arange(20.0))
    size = shape[0] if side == "left" else shape[1]
    basis = sketched_basis(x, 5, side=side, sketch=normal(11, size, 10), power_iterations=2)
    exact = top_basis(x, 5, side=side)
    assert close((basis * exact).sum(0).abs(), torch.ones(5, dtype=x.dtype), atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 30), (40, 20), (20, 40)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_warm_start_from_the_solution_stays_there(shape: tuple[int, int], side: Side) -> None:
    x = with_spectrum(12, *shape, 1 / (1 + torch.arange(20.0)))
    exact = top_basis(x, 6, side=side)
    for rotate in (True, False):
        again = sketched_basis(x, 6, side=side, sketch=exact, power_iterations=0, rotate=rotate)
        assert close(projector(again), projector(exact), atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", AWKWARD)
def test_sketch_of_awkward_matrices_is_orthonormal(kind: str, side: Side) -> None:
    x = AWKWARD[kind].float()
    size = x.shape[0] if side == "left" else x.shape[1]
    rank = min(4, size)
    basis = sketched_basis(x, rank, side=side, sketch=normal(13, size, rank + 6))
    assert basis.shape == (size, rank)
    assert gram_error(basis) < 5e-6


def test_batched_sketch_and_basis_equal_one_by_one() -> None:
    x = normal(14, 2, 3, 8, 6)
    x[0, 1] = 0
    sketch = normal(15, 2, 3, 6, 4)
    batched = sketched_basis(x, 3, side="right", sketch=sketch)
    exact = top_basis(x, 3, side="left", method="gram")
    for i in range(2):
        for j in range(3):
            one = sketched_basis(x[i, j], 3, side="right", sketch=sketch[i, j])
            assert close(projector(batched[i, j]), projector(one), atol=1e-8)
            one = top_basis(x[i, j], 3, side="left", method="svd")
            if x[i, j].any():
                assert close(projector(exact[i, j]), projector(one), atol=1e-8)
    shared = sketched_basis(x, 3, side="right", sketch=sketch[0, 0])
    assert shared.shape == (2, 3, 6, 3)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"rank must be between 1 and 4.*got 5"):
        top_basis(x, 5, side="left")
    with pytest.raises(ValueError, match=r"rank must be between 1 and 4.*got 0"):
        top_bases(x, 0)
    with pytest.raises(ValueError, match=r'side must be "left" or "right", got \'up\''):
        top_basis(x, 2, side="up")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r'method must be "auto", "svd" or "gram"'):
        top_basis(x, 2, side="left", method="qr")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"sketch must have shape \(\.\.\., 6, k\) with k >= rank"):
        sketched_basis(x, 3, side="right", sketch=torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"power_iterations must be at least 0, got -1"):
        sketched_basis(x, 2, side="right", sketch=torch.zeros(6, 2), power_iterations=-1)
