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


def spectrum(kind: str, size: int) -> Tensor:
    """Singular values from 1 down."""
    if kind == "steep":
        return torch.logspace(0, -6, size, dtype=torch.float64)
    values = torch.full((size,), 1e-3 if kind == "one large" else 1e-6, dtype=torch.float64)
    values[0 if kind == "one large" else slice(size // 8)] = 1.0
    return values


@pytest.mark.parametrize("kind", ["steep", "one large", "rank deficient"])
@pytest.mark.parametrize("seed", range(2))
def test_steps_in_groups_are_about_as_exact_as_one_by_one_in_float32(kind: str, seed: int) -> None:
    """On ill-conditioned wide matrices; a single group of five steps is 10 to 80 times worse."""
    left, right = (torch.linalg.qr(normal(seed + k, n, 64)).Q for k, n in ((10, 64), (20, 256)))
    x = (left * spectrum(kind, 64) @ right.mT).float()
    exact, plain = newton_schulz(x.double()), x / x.norm()
    for _ in range(5):
        gram = plain @ plain.mT
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    assert (newton_schulz(x) - exact).norm() <= 3.0 * (plain - exact).norm()


@pytest.mark.parametrize("shape", [(10, 14), (10, 15), (10, 47), (47, 10), (2, 3, 10, 25)])
def test_shapes_on_both_sides_of_grouping_take_the_same_steps(shape: tuple[int, ...]) -> None:
    x = normal(5, *shape)
    for steps in range(8):
        value = x / torch.linalg.matrix_norm(x, keepdim=True)
        for _ in range(steps):
            gram = value @ value.mT
            value = 3.4445 * value + (-4.7750 * gram + 2.0315 * gram @ gram) @ value
        assert close(newton_schulz(x, steps), value, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
def test_overwriting_gives_the_same_result(shape: tuple[int, int]) -> None:
    x = normal(6, *shape)
    assert torch.equal(newton_schulz(x.clone(), overwrite=True), newton_schulz(x))


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
