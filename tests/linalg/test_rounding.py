"""Stochastic rounding: unbiased, exact where it can be, kind to infinities and NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.linalg import generator, stochastic_round_


def rounded(source: Tensor, seed: int = 0) -> Tensor:
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    return stochastic_round_(target, source, generator(seed))


def neighbours(source: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 values next to finite `source` towards and away from zero, as float64."""
    toward = (source.view(torch.int32) & -0x10000).view(torch.float32)
    away = ((source.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    return toward.double(), away.double()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    st.integers(0, 2**31),
)
def test_result_is_one_of_the_two_neighbours(values: list[float], seed: int) -> None:
    source = torch.tensor(values)
    toward, away = neighbours(source)
    found = rounded(source, seed).double()
    assert bool(((found == toward) | (found == away)).all())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=9), st.integers(0, 99))
def test_representable_values_stay(values: list[float], seed: int) -> None:
    source = torch.tensor(values).bfloat16().float()
    assert torch.equal(rounded(source, seed).float(), source)


def test_infinities_nan_and_signed_zero_are_kept() -> None:
    source = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0]).repeat(50)
    found = rounded(source).float()
    assert torch.equal(found.nan_to_num(nan=7.0), source.nan_to_num(nan=7.0))
    zero = source == 0
    assert torch.equal(found[zero].signbit(), source[zero].signbit())


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-20, -2.7e30, 1e-39])
def test_mean_of_many_roundings_is_the_value(value: float) -> None:
    count = 200_000
    source = torch.full((count,), value)
    toward, away = neighbours(source[:1])
    found = rounded(source, seed=3).double()
    gap = float((away - toward).abs())
    # The result is toward + gap * Bernoulli: at most gap / 2 of deviation per draw.
    assert abs(float(found.mean()) - float(source[0])) < 5 * gap / 2 / count**0.5


def test_neighbouring_elements_are_rounded_independently() -> None:
    # Four elements share one 64-bit draw; pairs within and across draws must not be correlated.
    source = torch.full((80_000, 4), 1.0 + 2.0**-8)
    up = (rounded(source) > 1).double() - 0.5
    products = torch.cat([up, up.roll(1, 0)], dim=1)
    correlation = products.mT @ products / (0.25 * up.shape[0])
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert float(off_diagonal.abs().max()) < 5 / up.shape[0] ** 0.5


def test_non_contiguous_and_large_tensors_are_written_in_place() -> None:
    target = torch.zeros(6, 4, dtype=torch.bfloat16)
    source = torch.arange(24.0).view(4, 6)
    assert stochastic_round_(target.mT, source, generator(0)) is not None
    assert torch.equal(target.float(), source.mT)
    large = torch.arange(2**20 + 5.0) % 256
    assert torch.equal(rounded(large).float(), large)
    assert rounded(torch.zeros(0)).shape == (0,)
    assert float(rounded(torch.tensor(2.0))) == 2.0


def test_source_is_not_changed_and_the_seed_decides() -> None:
    source = torch.rand(100)
    copy = source.clone()
    assert torch.equal(rounded(source, 1), rounded(source, 1))
    assert not torch.equal(rounded(source, 1), rounded(source, 2))
    assert torch.equal(source, copy)


def test_wrong_dtypes_and_shapes_are_refused() -> None:
    low, full = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    with pytest.raises(TypeError, match=r"float32 source into bfloat16 target"):
        stochastic_round_(full, full, generator(0))
    with pytest.raises(TypeError, match=r"got source torch.bfloat16"):
        stochastic_round_(low, low, generator(0))
    with pytest.raises(ValueError, match=r"shape of target \(2,\), got \(3,\)"):
        stochastic_round_(low, torch.zeros(3), generator(0))
