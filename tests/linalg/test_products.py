"""Products that are known to be symmetric: half the blocks, the same matrix."""

import pytest
import torch
from torch import Tensor

from subspan.linalg import products
from subspan.linalg.products import add_symmetric_product_


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recursion several levels deep with small matrices."""
    monkeypatch.setattr(products, "_SMALLEST_HALF", 2)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 16, 21])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_a_matrix_times_its_transpose_equals_the_plain_product(
    size: int, batch: tuple[int, ...]
) -> None:
    x = normal(size, *batch, size, 5)
    target = torch.full((*batch, size, size), torch.nan, dtype=torch.float64)
    result = add_symmetric_product_(target, x, x.mT, beta=0.0)
    assert result is target
    torch.testing.assert_close(target, torch.einsum("...ik,...jk->...ij", x, x))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("transposed", [False, True])
def test_it_adds_to_a_symmetric_target_with_both_factors(seed: int, transposed: bool) -> None:
    x, y = normal(seed, 13, 6), normal(seed + 9, 13, 13)
    target = (y + y.mT).mT if transposed else y + y.mT
    expected = 0.25 * target.clone() - 3.0 * torch.einsum("ik,jk->ij", x, x)
    add_symmetric_product_(target, x, x.mT, alpha=-3.0, beta=0.25)
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("seed", range(3))
def test_symmetric_matrices_that_commute_have_a_symmetric_product(seed: int) -> None:
    vectors = torch.linalg.qr(normal(seed, 11, 11)).Q
    a, b = (vectors * normal(seed + k, 11) @ vectors.mT for k in (20, 40))
    target = torch.empty(11, 11, dtype=torch.float64)
    torch.testing.assert_close(add_symmetric_product_(target, a, b, beta=0.0), a @ b)
