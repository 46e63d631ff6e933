"""Two 4-bit codes per byte."""

import pytest
import torch

from subspan.linalg.quantise import pack_nibbles, unpack_nibbles


def test_nibbles_are_interleaved() -> None:
    codes = torch.tensor([[1, 2, 15, 0, 7], [3, 4, 5, 6, 8]], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0x0F, 0x07], [0x43, 0x65, 0x08]]
    assert torch.equal(unpack_nibbles(packed, 5), codes)


@pytest.mark.parametrize("count", [0, 1, 2, 33, 64])
def test_nibbles_survive_packing_wherever_they_start(count: int) -> None:
    codes = torch.randint(
        16, (count + 1,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8
    )
    for start in (0, 1):
        part = codes[start : start + count]
        assert torch.equal(unpack_nibbles(pack_nibbles(part), count), part)
        assert pack_nibbles(part).shape == (-(-count // 2),)


def test_a_count_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"count=5 does not fit 2 bytes"):
        unpack_nibbles(torch.zeros(2, dtype=torch.uint8), 5)
