"""Random numbers that depend on integers alone: the same on every device and after every resume."""

import math

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .orthonormal import householder_basis
from .shapes import check_rank

_MASK_64 = (1 << 64) - 1
_MAX_SEED = (1 << 63) - 1


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device`, seeded with `seed`."""
    return torch.Generator(device=device).manual_seed(seed)


def derive_seed(*integers: int) -> int:
    """A 63-bit seed mixed from any number of integers; order and number of them matter.

    One splitmix64 step per integer ("Fast splittable pseudorandom number generators", Steele, Lea,
    Flood, 2014), so neighbouring inputs (parameter 3, refresh 7) give unrelated streams.
    """
    state = len(integers)
    for integer in integers:
        state = _splitmix64(state ^ _splitmix64(integer & _MASK_64))
    return _splitmix64(state) & _MAX_SEED


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)


def _draw_seeds(seed: int, count: int) -> list[int]:
    source = generator(seed)
    return [int(torch.randint(0, _MAX_SEED, (1,), generator=source)) for _ in range(count)]


def next_seed(seed: int) -> int:
    """The seed after `seed` in the chains of the Flora and APOLLO codes.

    It is the 15th draw of torch.randint(0, 2**63 - 1) from a CPU generator seeded with `seed`
    ("Flora: Low-Rank Adapters Are Secretly Gradient Compressors", 2024, arXiv:2402.03293; "APOLLO:
    SGD-like Memory, AdamW-level Performance", 2024, arXiv:2412.05270).
    """
    return _draw_seeds(seed, 15)[-1]


def split_seed(seed: int) -> tuple[int, int]:
    """The (left, right) seeds that the Flora code draws from one parameter's seed.

    A left basis is drawn from the first, a right basis from the second (arXiv:2402.03293).
    """
    left, right = _draw_seeds(seed, 2)
    return left, right


def gaussian(
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent N(0, 1) entries.

    Always drawn by a CPU generator and then moved, because CPU and GPU generators give different
    numbers for one seed and a checkpoint must decode the same everywhere. Lower precisions are
    rounded from the float32 draw.
    """
    draw = torch.randn(shape, generator=generator(seed), dtype=compute_dtype(dtype))
    return draw.to(device=device, dtype=dtype)


def gaussian_basis(
    seed: int,
    size: int,
    rank: int,
    *,
    rows: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A (size, rank) basis A of independent N(0, 1) / sqrt(rank) entries, so E[A Aᵀ] = I.

    `rows` decides the order of the draw: False draws (size, rank), True draws (rank, size) and
    returns its transpose. With an (m, n) gradient the published codes do

    | code | left, size m | right, size n |
    | --- | --- | --- |
    | Flora (arXiv:2402.03293) | rows=True, first of `split_seed` | rows=False, second of it |
    | APOLLO (arXiv:2412.05270) | rows=False, the seed itself | rows=True, the seed itself |

    Raises:
        ValueError: `rank` is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    shape = (rank, size) if rows else (size, rank)
    draw = gaussian(seed, shape, compute_dtype(dtype)).div_(math.sqrt(rank))
    return (draw.mT if rows else draw).to(device=device, dtype=dtype)


def random_orthogonal(
    seed: int,
    size: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Orthonormal columns (size, rank), uniform over all such matrices.

    The Q of a QR of a Gaussian matrix with diag(R) > 0; without that sign the distribution would
    depend on the QR routine ("How to generate random matrices from the classical compact groups",
    Mezzadri, 2007, arXiv:math-ph/0609050). Computed on the CPU, then moved.

    Raises:
        ValueError: `rank` is not between 1 and `size`.
    """
    check_rank(rank, size)
    draw = gaussian(seed, (size, rank), compute_dtype(dtype))
    return householder_basis(draw).to(device=device, dtype=dtype)


def random_coordinates(
    seed: int, size: int, rank: int, device: torch.device | str = "cpu"
) -> Tensor:
    """`rank` different integers of range(size), sorted: (rank) int64. Drawn on the CPU.

    Raises:
        ValueError: `rank` is not between 1 and `size`.
    """
    check_rank(rank, size)
    chosen = torch.randperm(size, generator=generator(seed))[:rank]
    return chosen.sort().values.to(device)


def random_permutation(seed: int, size: int) -> Tensor:
    """A random order of range(size): (size,) int64. Drawn on the CPU."""
    return torch.randperm(size, generator=generator(seed))
