"""The values that codes stand for."""

from __future__ import annotations

import weakref
from fractions import Fraction

import pytest
import torch

from subspan.linalg.codebooks import dynamic_codebook, linear_codebook, nearest_table


def exact_dynamic(signed: bool, bits: int) -> list[Fraction]:
    """Dettmers et al. 2021, in exact arithmetic: an indicator bit in front of e zero bits leaves
    the rest of the bits for the place between 10^-e / 10 and 10^-e."""
    values = [Fraction(0), Fraction(1)]
    fraction_bits = range(bits - 1) if signed else range(1, bits)
    for zeros, width in enumerate(reversed(fraction_bits)):
        for place in range(2**width):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * place + 1, 2 * 2**width)
            values += [middle / 10**zeros, -middle / 10**zeros][: 2 if signed else 1]
    return sorted(values)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dynamic_map_is_the_published_one(signed: bool, bits: int) -> None:
    found = dynamic_codebook(signed, bits)
    exact = exact_dynamic(signed, bits)
    assert found.dtype == torch.float32 and len(found) == len(exact) == 2**bits
    # Two roundings to float32 per entry.
    expected = torch.tensor([float(value) for value in exact], dtype=torch.float64)
    assert bool(((found - expected).abs() <= 2.0**-22 * expected.abs()).all())
    assert float(found[exact.index(0)]) == 0.0 and float(found[-1]) == 1.0


def test_dynamic_maps_have_the_values_other_libraries_print() -> None:
    four = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [*(-x for x in reversed(four)), 0.0, *four, 1.0]
    torch.testing.assert_close(dynamic_codebook(True, 4), torch.tensor(expected))
    eight = dynamic_codebook(True)
    torch.testing.assert_close(eight[:2], torch.tensor([-0.99296875, -0.97890625]))
    torch.testing.assert_close(
        eight[[126, 128, 129, 131]], torch.tensor([-5.5e-7, 5.5e-7, 3.25e-6, 2.125e-5])
    )
    unsigned = dynamic_codebook(False)
    torch.testing.assert_close(unsigned[[1, 2, 7]], torch.tensor([3.25e-7, 7.75e-7, 1.5625e-5]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_maps_are_symmetric_or_without_zero(bits: int) -> None:
    signed, unsigned = linear_codebook(True, bits), linear_codebook(False, bits)
    assert torch.equal(signed, -signed.flip(0)) and int((signed == 0).sum()) == 2
    assert float(signed[-1]) == 1.0 and len(signed) == len(unsigned) == 2**bits
    expected = [Fraction(code + 1, 2**bits) for code in range(2**bits)]
    assert [Fraction(x) for x in unsigned.tolist()] == expected


def test_maps_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_codebook(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("bits", [-1, 1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    for codebook in (dynamic_codebook, linear_codebook):
        with pytest.raises(ValueError, match=f"bits must be from 2 to 8, got {bits}"):
            codebook(True, bits)


def test_a_table_is_built_once_and_lives_as_long_as_its_codebook() -> None:
    codebook = dynamic_codebook(True, 4)
    table = weakref.ref(nearest_table(codebook))
    assert nearest_table(codebook) is table() is not None
    del codebook
    assert table() is None
