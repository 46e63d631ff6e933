"""The row-wise affine quantiser, and the faults of the released one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subspan.linalg import row_affine
from subspan.linalg.row_affine import dequantise_rows, quantise_rows


def matrix(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(
        *shape[:-1], 1, generator=generator
    ).mul(6).exp() + torch.randn(*shape[:-1], 1, generator=generator)


def restored(x: Tensor, bits: int, as_released: bool = False) -> Tensor:
    return dequantise_rows(
        *quantise_rows(x, bits, as_released=as_released),
        x.shape[-1],
        bits,
        as_released=as_released,
    )


def literal(x: Tensor, bits: int, as_released: bool) -> Tensor:
    """The equations, entry by entry in float64; the released 4-bit order written out."""
    rows = x.double().tolist()
    divisor = 15 if bits == 4 or as_released else 255
    low = [min(row) for row in rows]
    step = [(max(row) - min(row)) / divisor for row in rows]
    codes = [[int((value - low[i]) / step[i] + 0.5) for value in row] for i, row in enumerate(rows)]
    if bits == 4 and as_released:
        flat = [code for row in codes for code in row]
        flat = flat[0::2] + flat[1::2]
        n = x.shape[1]
        codes = [flat[i * n : (i + 1) * n] for i in range(x.shape[0])]
    return torch.tensor(
        [[code * step[i] + low[i] for code in row] for i, row in enumerate(codes)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 8), (1, 2)])
def test_values_are_those_of_the_equations(
    shape: tuple[int, int], bits: int, as_released: bool
) -> None:
    for seed in range(3):
        x = matrix(seed, *shape)
        expected = literal(x, bits, as_released)
        found = restored(x, bits, as_released).double()
        # Rounding of x may move a code at a half; none of these seeds has such a case.
        assert bool(((found - expected).abs() <= 1e-6 * expected.abs().amax()).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(7, 33), (3, 4, 10), (2, 1), (300, 2)])
def test_error_is_at_most_half_a_step(shape: tuple[int, ...], bits: int) -> None:
    x = matrix(4, *shape)
    half = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1) / 2
    slack = 1e-6 * x.abs().amax(-1, keepdim=True)
    assert bool(((restored(x, bits) - x).abs() <= half + slack).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_one_value_come_back_exactly(bits: int) -> None:
    x = torch.tensor([[0.0] * 5, [-3.7] * 5, [1e-44] * 5, [3e38] * 5])
    assert torch.equal(restored(x, bits), x)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_range_of_few_subnormal_steps_does_not_overflow_the_codes(bits: int) -> None:
    # 382 / 255 of the smallest number rounds to 1 of it: the last code would be 382.
    x = torch.arange(383, dtype=torch.int32).view(torch.float32)[None]
    assert bool((restored(x, bits).diff() >= 0).all())


def test_levels_are_255_or_as_released_15() -> None:
    x = torch.linspace(-1, 1, 1024)[None]
    assert len(restored(x, 8).unique()) == 256
    assert len(restored(x, 8, as_released=True).unique()) == 16
    assert len(restored(x, 4).unique()) == 16


def test_released_four_bits_come_back_permuted() -> None:
    x = torch.tensor([[0.0, 15.0, 1.0, 14.0], [2.0, 13.0, 0.0, 15.0]])
    assert torch.equal(restored(x, 4), x)
    permuted = torch.tensor([[0.0, 1.0, 2.0, 0.0], [15.0, 14.0, 13.0, 15.0]])
    assert torch.equal(restored(x, 4, as_released=True), permuted)
    batch = torch.stack([x, x.flip(0)])
    found = restored(batch, 4, as_released=True)
    assert torch.equal(found[0], permuted)
    assert torch.equal(found[1], restored(x.flip(0), 4, as_released=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_value_that_is_not_finite_spoils_its_row_only(bits: int, bad: float) -> None:
    x = matrix(5, 3, 8)
    clean = restored(x, bits)
    x[1, 3] = bad
    found = restored(x, bits)
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[::2], clean[::2])


@pytest.mark.parametrize("bits", [4, 8])
def test_result_does_not_depend_on_the_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix(6, 3, 5, 7)
    whole = quantise_rows(x, bits)
    back = dequantise_rows(*whole, 7, bits)
    monkeypatch.setitem(row_affine._PIECE, "cpu", 20)
    pieces = quantise_rows(x, bits)
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))
    assert torch.equal(dequantise_rows(*pieces, 7, bits), back)
    assert pieces[0].shape == ((3, 5, 4) if bits == 4 else (3, 5, 7))
    assert pieces[1].shape == pieces[2].shape == (3, 5)


@pytest.mark.parametrize("bits", [4, 8])
def test_given_tensors_are_written_and_other_dtypes_rounded_once(bits: int) -> None:
    x = matrix(7, 4, 9).bfloat16()
    expected = quantise_rows(x.float(), bits)
    given = tuple(torch.empty_like(part) for part in expected)
    assert quantise_rows(x.t().contiguous().t(), bits, out=given) is given
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    out = torch.empty(4, 9, dtype=torch.bfloat16)
    assert dequantise_rows(*given, 9, bits, out=out) is out
    assert torch.equal(out, dequantise_rows(*given, 9, bits).bfloat16())
    assert torch.equal(out, dequantise_rows(*given, 9, bits, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
def test_empty_matrices_pass(shape: tuple[int, ...], bits: int) -> None:
    assert restored(torch.empty(shape), bits).shape == shape


def test_bad_arguments_are_refused() -> None:
    x = torch.ones(2, 4)
    codes, low, step = quantise_rows(x, 4)
    with pytest.raises(ValueError, match=r"bits must be 4 or 8, got 5"):
        quantise_rows(x, 5)
    with pytest.raises(ValueError, match=r"bits must be 4 or 8, got 2"):
        dequantise_rows(codes, low, step, 4, 2)
    with pytest.raises(TypeError, match=r"x must be of a floating dtype, got torch.int64"):
        quantise_rows(x.long(), 4)
    with pytest.raises(ValueError, match=r"shape \(..., m, n\), got \(4,\)"):
        quantise_rows(x[0], 4)
    with pytest.raises(ValueError, match=r"out must hold \(8, 2, 2\) codes, lows and steps"):
        quantise_rows(x, 8, out=(codes, low, step))
    with pytest.raises(ValueError, match=r"shapes \(..., m, 3\), \(..., m\) and \(..., m\)"):
        dequantise_rows(codes, low, step, 6, 4)
    with pytest.raises(ValueError, match=r"out must have the shape \(2, 4\), got \(4, 2\)"):
        dequantise_rows(codes, low, step, 4, 4, out=torch.empty(4, 2))
