"""The DCT by FFT, by columns, and by its defining cosine sum agree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.linalg import dct, dct_basis
from subspan.linalg.dct import shuffled_inverse, shuffled_places


def close(a: Tensor, b: Tensor, atol: float = 0.0, rtol: float = 0.0) -> bool:
    """torch.allclose without its default relative tolerance, which would hide float32 errors."""
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(n: int) -> Tensor:
    """Q[j, i] = s_i cos(pi i (2 j + 1) / (2 n)), entry by entry."""
    rows = [
        [
            math.sqrt((1 if i == 0 else 2) / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n))
            for i in range(n)
        ]
        for j in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 15, 32])
def test_basis_is_the_defining_cosine_matrix_and_orthogonal(n: int) -> None:
    basis = dct_basis(n, dtype=torch.float64)
    assert close(basis, by_definition(n), atol=1e-13)
    assert close(basis.mT @ basis, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(dct_basis(n, inverse=True, dtype=torch.float64), basis.mT)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 33), st.integers(0, 2**31), st.booleans())
def test_transform_by_fft_equals_the_dense_product(n: int, seed: int, inverse: bool) -> None:
    x = normal(seed, 2, 3, n)
    expected = x @ (by_definition(n).mT if inverse else by_definition(n))
    assert close(dct(x, inverse=inverse), expected, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 33), st.integers(0, 2**31), st.sampled_from([0, 1, -1, -2]))
def test_inverse_undoes_the_transform_along_any_dimension(n: int, seed: int, dim: int) -> None:
    x = normal(seed, n, n).mT
    assert close(dct(dct(x, dim), dim, inverse=True), x, atol=1e-11)
    assert close(dct(x, dim).norm(), x.norm(), rtol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 15, 32])
@pytest.mark.parametrize("dim", [-1, -2])
def test_shuffled_outputs_are_where_they_are_said_to_be(n: int, dim: int) -> None:
    x = normal(n, 2, n, n)
    places = shuffled_places(n)
    assert sorted(places.tolist()) == list(range(n))
    basis = by_definition(n).mT
    expected = x @ basis if dim == -1 else basis.mT @ x
    assert close(shuffled_inverse(x, dim).index_select(dim, places), expected, atol=1e-11)


def test_transform_along_rows_is_the_left_product() -> None:
    x = normal(0, 6, 5)
    assert close(dct(x, dim=-2), by_definition(6).mT @ x, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
def test_chosen_columns_are_columns_of_the_whole(inverse: bool) -> None:
    index = torch.tensor([[3, 0, 6], [5, 5, 1]])
    whole = dct_basis(7, inverse=inverse, dtype=torch.float64)
    chosen = dct_basis(7, index, inverse=inverse, dtype=torch.float64)
    assert chosen.shape == (2, 7, 3)
    assert torch.equal(chosen[0], whole[:, index[0]])
    assert torch.equal(chosen[1], whole[:, index[1]])


def test_long_columns_keep_full_accuracy_in_float32() -> None:
    basis = dct_basis(4096, torch.tensor([4095, 1, 2048]))
    exact = dct_basis(4096, torch.tensor([4095, 1, 2048]), dtype=torch.float64)
    assert close(basis.double(), exact, atol=2e-9)


def test_bfloat16_is_transformed_in_float32() -> None:
    x = normal(1, 3, 8).bfloat16()
    assert torch.equal(dct(x), dct(x.float()))


def test_empty_length_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        dct_basis(0)
