"""Blockwise quantisation and packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.linalg import quantise
from subspan.linalg.codebooks import dynamic_codebook, linear_codebook
from subspan.linalg.quantise import dequantise_blocks, pack_nibbles, quantise_blocks

BOOKS = {
    f"{kind.__name__.split('_')[0]}-{'signed' if signed else 'unsigned'}-{bits}": kind(signed, bits)
    for kind in (dynamic_codebook, linear_codebook)
    for signed in (True, False)
    for bits in (8, 4, 2)
}
EIGHT = dynamic_codebook(True)
FOUR = dynamic_codebook(True, 4)


def samples(seed: int, signed: bool, count: int = 3000) -> Tensor:
    """Numbers of many magnitudes, like moments."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x *= torch.exp(2.5 * torch.randn(count, generator=generator))
    return x if signed else x.abs()


def ratios(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """x / scale in float32, block by block."""
    parts = zip(x.reshape(-1).split(block), scale, strict=True)
    return torch.cat([part / top for part, top in parts])


@pytest.mark.parametrize("name", sorted(BOOKS))
@pytest.mark.parametrize("block", [256, 64, 5000])
def test_code_is_the_nearest_entry(name: str, block: int) -> None:
    codebook = BOOKS[name]
    for seed in range(3):
        x = samples(seed, "unsigned" not in name)
        codes, scale = quantise_blocks(x, codebook, block)
        expected = torch.stack([part.abs().max() for part in x.split(block)])
        assert torch.equal(scale, expected) and codes.shape == x.shape
        distance = (ratios(x, scale, block).double()[:, None] - codebook.double()).abs()
        assert torch.equal(distance.gather(1, codes.long()[:, None])[:, 0], distance.amin(1))


@pytest.mark.parametrize("name", sorted(BOOKS))
def test_next_to_every_middle_the_code_is_still_nearest_and_in_the_middle_the_upper(
    name: str,
) -> None:
    codebook = BOOKS[name].double()
    middles = (codebook[1:] + codebook[:-1]) / 2
    near = [middles.float()]
    for direction in (torch.inf, -torch.inf):
        for _ in range(3):
            near.append(torch.nextafter(near[-1], torch.tensor(direction)))
    x = torch.cat([*near, torch.tensor([1.0])])
    codes, _ = quantise_blocks(x, BOOKS[name], x.numel())
    expected = (x.double()[:, None] >= middles).sum(1)
    assert torch.equal(codes.long(), expected)


@settings(deadline=None, max_examples=200)
@given(st.floats(-1.0, 1.0, width=32), st.sampled_from(sorted(BOOKS)))
def test_any_number_between_minus_one_and_one_gets_a_nearest_entry(value: float, name: str) -> None:
    codebook = BOOKS[name]
    codes, _ = quantise_blocks(torch.tensor([1.0, value]), codebook)
    distances = (codebook.double() - value).abs()
    assert float(distances[int(codes[1])]) == float(distances.min())


@pytest.mark.parametrize("name", sorted(BOOKS))
def test_entries_are_read_back_exactly(name: str) -> None:
    codebook = BOOKS[name]
    x = 0.5 * codebook  # the last entry is 1: it makes the scale
    codes, scale = quantise_blocks(x, codebook)
    assert torch.equal(dequantise_blocks(codes, scale, codebook), x)


# Codes of bitsandbytes 0.50.2, CPU, block 256, for (-1)^i 10^(-i / 4), i = 0 .. 31, and for the
# magnitudes, with 0 at i = 20.
RECORDED = {
    True: "255 31 206 58 190 79 166 93 158 103 146 110 142 115 136 119 "
    "134 122 132 123 131 123 131 123 131 123 131 123 131 123 131 131",
    False: "255 192 157 138 126 95 78 68 62 47 38 33 30 23 18 16 "
    "14 10 10 7 7 7 7 7 7 7 7 7 7 7 7 7",
}


@pytest.mark.parametrize("signed", [True, False])
def test_grid_gives_the_codes_of_bitsandbytes(signed: bool) -> None:
    x = torch.tensor([(-1.0) ** (i * signed) * 10.0 ** (-i / 4) for i in range(32)])
    x[20] = 0
    codebook = dynamic_codebook(signed)
    codes, _ = quantise_blocks(x, codebook, grid=True)
    assert codes.tolist() == [int(code) for code in RECORDED[signed].split()]
    exact, _ = quantise_blocks(x, codebook)
    assert torch.equal(codes[:17], exact[:17])  # down to 1e-4
    assert float(codebook[int(exact[20])]) == 0.0 < 1e-5 < float(codebook[int(codes[20])])


@pytest.mark.parametrize("signed", [True, False])
def test_grid_equals_bitsandbytes_on_its_whole_grid_and_on_random_numbers(signed: bool) -> None:
    pytest.importorskip("bitsandbytes")
    codebook = dynamic_codebook(signed)
    grid = torch.arange(65536) / 65535 * 2 - 1
    cases = [(torch.cat([grid, torch.ones(1)]), 1 << 17)]
    cases += [(samples(seed, signed, 100_003), 256) for seed in range(3)]
    for x, block in cases:
        codes, scale = quantise_blocks(x, codebook, block, grid=True)
        expected = torch.ops.bitsandbytes.quantize_blockwise(x, codebook, block)
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
        back = torch.ops.bitsandbytes.dequantize_blockwise(
            codes, scale, codebook, block, torch.float32
        )
        assert torch.equal(dequantise_blocks(codes, scale, codebook, block), back)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("name", ["dynamic-signed-8", "linear-unsigned-8", "linear-unsigned-4"])
def test_blocks_of_zeros_come_back_as_zeros(name: str, grid: bool) -> None:
    x = samples(0, False, 40)
    x[8:24] = 0
    x[20] = -0.0
    codes, scale = quantise_blocks(x, BOOKS[name], 8, grid=grid)
    back = dequantise_blocks(codes, scale, BOOKS[name], 8)
    assert bool((back[8:24] == 0).all()) and not bool(back[8:24].signbit().any())
    assert bool((back[:8] != 0).any()) and bool((back[24:] != 0).any())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("name", ["dynamic-signed-8", "linear-unsigned-4"])
def test_a_value_that_is_not_finite_spoils_its_block_only(
    name: str, grid: bool, bad: float
) -> None:
    x = samples(0, False, 32)
    clean = dequantise_blocks(*quantise_blocks(x, BOOKS[name], 8, grid=grid), BOOKS[name], 8)
    x[11] = bad
    back = dequantise_blocks(*quantise_blocks(x, BOOKS[name], 8, grid=grid), BOOKS[name], 8)
    spoilt = torch.arange(32) // 8 == 1
    assert not bool(back[spoilt].isfinite().any())
    assert torch.equal(back[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-30, 1e30, 3e38])
def test_the_range_of_float32_is_used_fully(magnitude: float) -> None:
    x = torch.tensor([1.0, 0.5, 0.0, -0.25]) * magnitude
    back = dequantise_blocks(*quantise_blocks(x, EIGHT), EIGHT)
    # Entries are 0.9 / 64 apart below 1; a subnormal product is rounded to a multiple of 2^-149.
    torch.testing.assert_close(back, x, rtol=0, atol=0.008 * magnitude + 2.0**-149)
    assert float(back[0]) == float(x[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 300, 1001])
def test_result_does_not_depend_on_the_pieces(
    count: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = samples(1, True, count)
    whole = quantise_blocks(x, FOUR, 8, packed=packed)
    back = dequantise_blocks(*whole, FOUR, 8, count=count, packed=packed)
    monkeypatch.setitem(quantise._PIECE, "cpu", 20)
    pieces = quantise_blocks(x, FOUR, 8, packed=packed)
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))
    again = dequantise_blocks(*pieces, FOUR, 8, count=count, packed=packed)
    assert torch.equal(again, back) and back.shape == (count,)
    assert pieces[0].numel() == (-(-count // 2) if packed else count)


@pytest.mark.parametrize("count", [1, 256, 1001])
@pytest.mark.parametrize("grid", [False, True])
def test_packed_codes_are_the_codes_packed(count: int, grid: bool) -> None:
    x = samples(2, True, count)
    codes, scale = quantise_blocks(x, FOUR, 128, grid=grid)
    packed, same = quantise_blocks(x, FOUR, 128, packed=True, grid=grid)
    assert torch.equal(packed, pack_nibbles(codes)) and torch.equal(same, scale)
    back = dequantise_blocks(packed, scale, FOUR, 128, count=count, packed=True)
    assert torch.equal(back, dequantise_blocks(codes, scale, FOUR, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = samples(3, True).to(dtype)
    codes, scale = quantise_blocks(x, EIGHT)
    assert torch.equal(scale[0], x[:256].abs().max().float())
    if dtype != torch.float64:
        expected = quantise_blocks(x.float(), EIGHT)
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
    back = dequantise_blocks(codes, scale, EIGHT, dtype=dtype)
    assert torch.equal(back, dequantise_blocks(codes, scale, EIGHT).to(dtype))


def test_any_shape_is_taken_in_row_major_order() -> None:
    x = samples(4, True, 600).view(20, 30).t().requires_grad_()
    expected = quantise_blocks(x.detach().contiguous().view(-1), EIGHT, 64)
    found = quantise_blocks(x, EIGHT, 64)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert quantise_blocks(torch.tensor(3.0), EIGHT)[0].tolist() == [255]


def test_given_tensors_are_written_and_returned() -> None:
    x = samples(5, True, 600).view(20, 30)
    codes, scale = torch.empty(20, 30, dtype=torch.uint8), torch.empty(3, 1)
    found = quantise_blocks(x, EIGHT, codes=codes, scale=scale)
    assert found[0] is codes and found[1] is scale
    expected = quantise_blocks(x, EIGHT)
    assert torch.equal(codes.view(-1), expected[0]) and torch.equal(scale.view(-1), expected[1])
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(30, 20, dtype=dtype)
        assert dequantise_blocks(codes, scale, EIGHT, out=out) is out
        assert torch.equal(out.view(-1), dequantise_blocks(codes, scale, EIGHT, dtype=dtype))


def test_a_changed_codebook_is_noticed() -> None:
    codebook = FOUR.clone()
    x = samples(6, True, 100)
    before = quantise_blocks(x, codebook)[0]
    codebook.copy_(linear_codebook(True, 4))
    after = quantise_blocks(x, codebook)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, quantise_blocks(x, BOOKS["linear-signed-4"])[0])


class LargestNewTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made, but for those of given addresses."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("packed", [False, True])
def test_temporaries_are_no_larger_than_a_piece(packed: bool) -> None:
    x = torch.linspace(-1, 1, 1 << 19)
    codes, scale = quantise_blocks(x, FOUR, packed=packed)
    out = torch.empty_like(x)
    with LargestNewTensor(x, codes, scale, out) as largest:
        quantise_blocks(x, FOUR, codes=codes, scale=scale, packed=packed)
        dequantise_blocks(codes, scale, FOUR, packed=packed, out=out)
    assert 0 < largest.bytes <= 4 * quantise._PIECE["cpu"] < x.nbytes


def test_bad_arguments_are_refused() -> None:
    x = torch.ones(10)
    codes, scale = quantise_blocks(x, EIGHT)
    with pytest.raises(TypeError, match=r"x must be of a floating dtype, got torch.int64"):
        quantise_blocks(torch.arange(3), EIGHT)
    with pytest.raises(ValueError, match=r"block must be positive, got 0"):
        quantise_blocks(x, EIGHT, 0)
    with pytest.raises(ValueError, match=r"block must be positive, and even if packed, got 7"):
        quantise_blocks(x, FOUR, 7, packed=True)
    with pytest.raises(ValueError, match=r"shape \(n,\), n from 2 to 16, got \(256,\)"):
        quantise_blocks(x, EIGHT, packed=True)
    with pytest.raises(TypeError, match=r"codebook must be float32, got torch.float64"):
        quantise_blocks(x, EIGHT.double())
    with pytest.raises(ValueError, match=r"finite values in increasing order"):
        quantise_blocks(x, EIGHT.flip(0))
    with pytest.raises(ValueError, match=r"finite values in increasing order"):
        quantise_blocks(x, torch.tensor([0.0, torch.inf]), grid=True)
    with pytest.raises(ValueError, match=r"must differ by at least 1/128"):
        quantise_blocks(x, torch.tensor([0.0, 0.999, 0.9995, 1.0]))
    with pytest.raises(TypeError, match=r"codes must be torch.uint8, got torch.int32"):
        quantise_blocks(x, EIGHT, codes=torch.empty(10, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"scale must be contiguous with 1 elements"):
        quantise_blocks(x, EIGHT, scale=torch.empty(2))
    with pytest.raises(ValueError, match=r"out must be contiguous with 10 elements"):
        dequantise_blocks(codes, scale, EIGHT, count=10, out=torch.empty(9))
