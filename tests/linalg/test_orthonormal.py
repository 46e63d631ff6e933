"""Orthonormalisation: orthonormal for every input, spanning what was given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.linalg import householder_basis, orthonormalise

sizes = st.tuples(st.integers(1, 12), st.integers(0, 8)).map(lambda s: (s[0] + s[1], s[0]))
seeds = st.integers(0, 2**31)


def close(a: Tensor, b: Tensor, atol: float = 0.0, rtol: float = 0.0) -> bool:
    """torch.allclose without its default relative tolerance, which would hide float32 errors."""
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_error(basis: Tensor) -> float:
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return float((basis.mT @ basis - identity).abs().amax())


@settings(deadline=None, max_examples=40)
@given(sizes, seeds, st.integers(-12, 12))
def test_columns_are_orthonormal_and_span_the_input(
    size: tuple[int, int], seed: int, exponent: int
) -> None:
    d, r = size
    x = normal(seed, d, r) * 10.0**exponent
    basis = orthonormalise(x)
    assert gram_error(basis) < 1e-12
    assert close(basis @ (basis.mT @ x), x, rtol=1e-10, atol=1e-12 * 10.0**exponent)


@settings(deadline=None, max_examples=40)
@given(sizes, seeds)
def test_it_is_the_q_factor_with_positive_diagonal(size: tuple[int, int], seed: int) -> None:
    # A diagonal added to the square part keeps the condition number, hence the error, small.
    x = normal(seed, *size) + 6 * torch.eye(*size, dtype=torch.float64)
    triangle = orthonormalise(x).mT @ x
    assert close(triangle.tril(-1), torch.zeros_like(triangle), atol=1e-9)
    assert bool((triangle.diagonal() > 0).all())
    assert close(orthonormalise(x), householder_basis(x), atol=1e-9)


DEFICIENT = {
    "zero": lambda x: torch.zeros_like(x),
    "rank one": lambda x: x[:, :1] @ x[:1, :],
    "repeated columns": lambda x: x[:, [0] * x.shape[1]],
    "zero columns": lambda x: torch.cat([x[:, :1], 0 * x[:, 1:]], dim=1),
    "nearly dependent": lambda x: x[:, :1] + 1e-13 * x,
    "subnormal": lambda x: x * 1e-310,
}


@pytest.mark.parametrize("kind", DEFICIENT)
@pytest.mark.parametrize("size", [(9, 4), (5, 5), (6, 1)])
def test_rank_deficient_input_is_completed(kind: str, size: tuple[int, int]) -> None:
    x = DEFICIENT[kind](normal(3, *size))
    basis = orthonormalise(x)
    assert gram_error(basis) < 1e-12
    assert close(basis @ (basis.mT @ x), x, atol=1e-12)
    assert torch.equal(basis, orthonormalise(x))


@pytest.mark.parametrize("exponent", [-40, -20, 0, 20])
def test_float32_of_any_scale_gives_orthonormal_columns(exponent: int) -> None:
    x = (normal(5, 64, 16) * 10.0**exponent).float()
    assert gram_error(orthonormalise(x)) < 2e-6


def test_ill_conditioned_float32_is_orthonormal() -> None:
    x = (normal(6, 40, 12) * torch.logspace(0, -7, 12, dtype=torch.float64)) @ normal(7, 12, 12)
    assert gram_error(orthonormalise(x.float())) < 2e-6


def test_batch_with_good_and_deficient_matrices_equals_one_by_one() -> None:
    x = normal(8, 2, 3, 7, 4)
    x[0, 1] = 0
    x[1, 2] = x[1, 2, :, :1] @ x[1, 2, :1, :]
    batched = orthonormalise(x)
    for i in range(2):
        for j in range(3):
            assert close(batched[i, j], orthonormalise(x[i, j]), atol=1e-12)


def test_non_contiguous_and_low_precision_inputs() -> None:
    x = normal(9, 4, 8).mT
    assert close(orthonormalise(x), orthonormalise(x.contiguous()), atol=1e-12)
    low = orthonormalise(x.bfloat16())
    assert low.dtype == torch.float32 and gram_error(low) < 2e-6


def test_input_is_not_changed() -> None:
    x = normal(10, 6, 3)
    copy = x.clone()
    orthonormalise(x)
    assert torch.equal(x, copy)


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no more columns than rows.*\(3, 4\)"):
        orthonormalise(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"x must have shape"):
        orthonormalise(torch.zeros(3))
