"""Newton-Schulz: acts on singular values only, and is Muon's arithmetic in bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.linalg import newton_schulz


def close(a: Tensor, b: Tensor, atol: float = 0.0, rtol: float = 0.0) -> bool:
    """torch.allclose without its default relative tolerance, which would hide float32 errors."""
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**31), st.integers(0, 6))
def test_it_is_the_scalar_polynomial_on_singular_values(
    m: int, n: int, seed: int, steps: int
) -> None:
    x = normal(seed, m, n)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert close(newton_schulz(x, steps), left * values @ right, atol=1e-9)


def test_singular_values_end_near_one() -> None:
    values = torch.linalg.svdvals(newton_schulz(normal(0, 40, 60)))
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_bfloat16_equals_the_arithmetic_of_torch_muon(shape: tuple[int, int]) -> None:
    muon = pytest.importorskip("torch.optim._muon", reason="torch has no Muon before 2.9")
    x = normal(1, *shape).float()
    expected = muon._zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    found = newton_schulz(x, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_batched_equals_looped_and_zero_stays_zero() -> None:
    x = normal(2, 2, 3, 5, 4)
    x[0, 0] = 0
    batched = newton_schulz(x)
    for i in range(2):
        for j in range(3):
            assert close(batched[i, j], newton_schulz(x[i, j]), atol=1e-12)
    assert not batched[0, 0].any()


def test_input_is_not_changed_and_dtype_is_the_computing_one() -> None:
    x = normal(3, 4, 4).bfloat16()
    copy = x.clone()
    assert newton_schulz(x).dtype == torch.float32
    assert newton_schulz(x, steps=0, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(x, copy)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        newton_schulz(torch.zeros(2, 2), steps=-1)
