"""The affine quantiser: the recorded codes of Q-GaLore, no range lost, unbiased where it rounds at
random."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from subspan.linalg import affine
from subspan.linalg.affine import dequantise_affine, quantise_affine

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED_GROUP = 128


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN / "qgalore_int8_weights.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


def decoded(x: Tensor, bits: int = 8, group: int = 256, **options: object) -> Tensor:
    """`x` after quantising and back, in its shape."""
    parts = quantise_affine(x, bits, group, **options)
    return dequantise_affine(*parts, group).view(x.shape)


@pytest.mark.parametrize("zero_in_range", [True, False])
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_codes_of_weights_equal_the_recording(
    recorded: dict[str, Tensor], weights: dict[str, Tensor], shape: str, zero_in_range: bool
) -> None:
    options = {"zero_in_range": zero_in_range}
    weight = weights[f"init/{shape}"]
    for kind, uniforms in (("nearest", None), ("stoch", recorded[f"stoch_uniform/{shape}"])):
        parts = quantise_affine(weight, 8, RECORDED_GROUP, uniforms=uniforms, **options)
        for name, part in zip(("q", "scale", "zero"), parts, strict=True):
            expected = recorded[f"{kind}_{name}/{shape}"].flatten()
            assert torch.equal(part.to(expected.dtype), expected), (kind, name)
    parts = quantise_affine(weight, 8, RECORDED_GROUP, **options)
    expected = recorded[f"nearest_dequant/{shape}"]
    assert torch.equal(dequantise_affine(*parts, RECORDED_GROUP).view(weight.shape), expected)


@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_four_bit_codes_of_a_basis_equal_the_recording(
    recorded: dict[str, Tensor], shape: str
) -> None:
    basis = recorded[f"basis_float/{shape}/step01"]
    codes, scale, zero = quantise_affine(basis, 4, RECORDED_GROUP)
    assert torch.equal(codes, recorded[f"basis_q/{shape}/step01"].flatten())
    assert torch.equal(scale, recorded[f"basis_scale/{shape}/step01"].flatten())
    assert torch.equal(zero.float(), recorded[f"basis_zero/{shape}/step01"].flatten())


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([1, 3, 16, 64]),
    count=st.integers(1, 100),
    centre=st.sampled_from([0.0, 0.3, -2.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_every_value_is_within_a_step_of_its_code(
    bits: int, group: int, count: int, centre: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = centre + torch.randn(count, generator=generator)
    codes, scale, zero = quantise_affine(x, bits, group)
    step = scale.repeat_interleave(group)[:count].double()
    offset = zero.repeat_interleave(group)[:count].double()
    value = step * (codes.double() - offset)
    assert int(codes.max()) < 2**bits
    # Half a step, and half a step more where the zero's own rounding moves the end of the range.
    assert bool(((value - x.double()).abs() <= step * (1 + 1e-4)).all())
    # Never further than the nearest code there is.
    levels = step[:, None] * (torch.arange(2.0**bits)[None] - offset[:, None])
    nearest = (levels - x.double()[:, None]).abs().amin(1)
    assert torch.allclose((value - x.double()).abs(), nearest, rtol=1e-3, atol=1e-4)


def test_a_group_far_from_zero_keeps_its_values_and_loses_them_in_the_released_code() -> None:
    x = 10 + torch.rand(256)
    assert float((decoded(x) - x).abs().max()) <= 11 / 255
    released = decoded(x, zero_in_range=False)
    assert float(released.max()) < 1.1
    assert float((decoded(-x) + x).abs().max()) <= 11 / 255


def test_equal_values_and_zeros_are_kept() -> None:
    for value in (0.37, -4.0, 2e-3):
        assert torch.allclose(decoded(torch.full((300,), value)), torch.tensor(value), rtol=1e-6)
    assert torch.equal(decoded(torch.zeros(300)), torch.zeros(300))
    mixed = torch.randn(300)
    mixed[::3] = 0
    assert torch.equal(decoded(mixed)[::3], torch.zeros(100))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean_of_stochastic_roundings_is_the_value(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The ends fix the grid to steps of 1 / 100; the values between are what is tested.
    x = torch.cat([torch.tensor([-1.0, 1.55]), torch.rand(62, generator=generator)])
    draws = 4000
    many = decoded(x.repeat(draws), 8, 64, generator=generator).view(draws, 64).double()
    error = (many.mean(0) - x.double()).abs()
    assert float(error.max()) < 5 * 0.01 / 2 / draws**0.5
    assert set(((many[:, 5] * 100).round()).tolist()) == {
        float((x[5] * 100).floor()),
        float((x[5] * 100).ceil()),
    }


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 4, 8]))
def test_values_that_codes_represent_are_not_moved_by_chance(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    largest = 2**bits - 1
    levels = torch.randint(0, largest + 1, (4, 64), generator=generator)
    levels[:, 0], levels[:, 1] = 0, largest
    x = (levels - 2.0 ** (bits - 1)) / 8
    assert torch.equal(decoded(x, bits, 64, generator=generator), x)


def test_seed_decides_the_rounding_and_neighbours_differ() -> None:
    x = torch.full((100_000,), 0.505)
    x[0], x[1] = -1.0, 1.55
    first, again, other = (
        quantise_affine(x, 8, 100_000, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    half = torch.full((80_000, 4), 0.505)
    half[0, 0], half[0, 1] = -1.0, 1.55
    found = decoded(half, 8, 320_000, generator=torch.Generator().manual_seed(3))
    up = (found > 0.505).double() - 0.5
    pairs = torch.cat([up, up.roll(1, 0)], dim=1)
    correlation = pairs.mT @ pairs / (0.25 * up.shape[0])
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert float(off_diagonal.abs().max()) < 5 / up.shape[0] ** 0.5


def test_pieces_and_a_short_last_group_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(70, 11)
    uniforms = torch.rand(25, 32)
    padded = torch.cat([x.flatten(), torch.zeros(30)]).view(25, 32)
    whole = quantise_affine(x, 8, 32, uniforms=uniforms)
    for row in range(25):
        alone = quantise_affine(padded[row], 8, 32, uniforms=uniforms[row : row + 1])
        kept = 32 if row < 24 else 770 - 24 * 32
        assert torch.equal(alone[0][:kept], whole[0][row * 32 :][:kept])
        assert torch.equal(alone[1], whole[1][row : row + 1])
        assert torch.equal(alone[2], whole[2][row : row + 1])
    monkeypatch.setitem(affine._CHUNK, "cpu", 100)
    again = quantise_affine(x, 8, 32, uniforms=uniforms)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert torch.equal(dequantise_affine(*whole, 32), dequantise_affine(*again, 32))


def test_a_value_that_is_not_finite_stays_visible() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(4, 64)
        x[1, 3] = bad
        found = decoded(x, 8, 64)
        assert not bool(found[1].isfinite().any())
        assert bool(found[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(300).to(dtype)
    parts = quantise_affine(x, 8)
    expected = quantise_affine(x.float(), 8)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    values = dequantise_affine(*parts, dtype=dtype)
    assert values.dtype == dtype
    assert torch.equal(values, dequantise_affine(*parts).to(dtype))


def test_strided_input_and_given_outputs() -> None:
    x = torch.randn(20, 30)
    expected = quantise_affine(x.mT.contiguous(), 8, 64)
    out = (
        torch.empty(30, 20, dtype=torch.uint8),
        torch.empty(10),
        torch.empty(10, dtype=torch.uint8),
    )
    found = quantise_affine(x.mT, 8, 64, out=out)
    assert found is out
    assert all(torch.equal(a.flatten(), b) for a, b in zip(out, expected, strict=True))
    values = torch.empty(30, 20, dtype=torch.bfloat16)
    assert dequantise_affine(*out, 64, out=values) is values
    assert torch.equal(values.flatten(), dequantise_affine(*expected, 64).bfloat16())
    assert dequantise_affine(*quantise_affine(torch.zeros(0), 8)).shape == (0,)


def test_input_is_not_changed_and_gets_no_graph() -> None:
    x = torch.randn(300, requires_grad=True)
    copy = x.detach().clone()
    parts = quantise_affine(x, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, copy)
    assert not any(part.requires_grad for part in parts)


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(300)
    with pytest.raises(TypeError, match=r"x must be of a real floating dtype, got torch.int64"):
        quantise_affine(torch.arange(3), 8)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=rf"bits must be from 1 to 8, got {bits}"):
            quantise_affine(x, bits)
    with pytest.raises(ValueError, match=r"group must be at least 1, got 0"):
        quantise_affine(x, 8, 0)
    with pytest.raises(ValueError, match=r"uniforms must have .* \(2, 256\), got \(300,\)"):
        quantise_affine(x, 8, uniforms=torch.rand(300))
    with pytest.raises(ValueError, match=r"give one of them"):
        quantise_affine(x, 8, uniforms=torch.rand(2, 256), generator=torch.Generator())
    codes, scale, zero = quantise_affine(x, 8)
    with pytest.raises(ValueError, match=r"300 codes, 2 scales and 2 zeros, got \(300, 1, 2\)"):
        quantise_affine(x, 8, out=(codes, scale[:1], zero))
    with pytest.raises(ValueError, match=r"2 elements for 300 codes .* of 256, got 2 and 1"):
        dequantise_affine(codes, scale, zero[:1])
    with pytest.raises(ValueError, match=r"out must have 300 elements, got 299"):
        dequantise_affine(codes, scale, zero, out=torch.empty(299))
