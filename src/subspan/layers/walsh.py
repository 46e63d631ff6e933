"""Walsh functions on the patches of a grid of tokens.

Used by `subspan.layers.walsh_hadamard`, whose introduction has the mathematics.
"""

import math

import torch
from torch import Tensor


def walsh_matrix(order: int) -> Tensor:
    """The Walsh functions of a length, by number of sign changes: (order, order) float32 of ±1.

    Raises:
        ValueError: `order` is not a power of two.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"order must be a power of two, got {order}")
    # On the CPU also where the layer is built on the meta device: the order is read off the values.
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    matrix = pair[:1, :1]
    while matrix.shape[0] < order:
        matrix = torch.kron(pair, matrix)
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[changes.argsort()]


def low_pass_functions(order: int, lp_tri_order: int) -> Tensor:
    """The Walsh functions B_pq of a patch with p + q < lp_tri_order: (order², rank), ±1.

    Raises:
        ValueError: `order` is not a power of two, or `lp_tri_order` not in 1 to 2 order - 1.
    """
    walsh = walsh_matrix(order)
    if not 1 <= lp_tri_order <= 2 * order - 1:
        raise ValueError(
            f"lp_tri_order must be from 1 to 2 * order - 1 = {2 * order - 1}, got {lp_tri_order}"
        )
    kept = [(p, q) for p in range(order) for q in range(order) if p + q < lp_tri_order]
    return torch.stack([torch.outer(walsh[p], walsh[q]).flatten() for p, q in kept], dim=1)


def coefficients_of(x: Tensor, functions: Tensor, grid: tuple[int, int], skip: int) -> Tensor:
    """Bᵀ x in every patch: (batch, skip + h w, c) -> (batch, patches, rank, c)."""
    pixels, _ = functions.shape
    order = math.isqrt(pixels)
    rows, columns = (_reflected(size, order, x.device) for size in grid)
    # (patch row, patch column, row in the patch, column in the patch)
    index = rows.view(-1, 1, order, 1) * grid[1] + columns.view(1, -1, 1, order) + skip
    patches = x.index_select(1, index.flatten()).unflatten(1, (-1, pixels))
    return functions.mT @ patches


def tokens_of(coefficients: Tensor, functions: Tensor, grid: tuple[int, int]) -> Tensor:
    """B times the coefficients, put back on the grid: -> (batch, h w, c)."""
    order = math.isqrt(functions.shape[0])
    device = coefficients.device
    places = [torch.arange(size, device=device) + _padding(size, order) for size in grid]
    (patch_row, row), (patch_column, column) = ((at // order, at % order) for at in places)
    patch = patch_row.view(-1, 1) * -(-grid[1] // order) + patch_column
    index = (patch * order + row.view(-1, 1)) * order + column
    return (functions @ coefficients).flatten(1, 2).index_select(1, index.flatten())


def _reflected(size: int, order: int, device: torch.device) -> Tensor:
    """Which of `size` places stands at each place of the line that reflection extends."""
    total = -(-size // order) * order
    places = (torch.arange(total, device=device) - _padding(size, order)).abs()
    return (size - 1) - ((size - 1) - places).abs()


def _padding(size: int, order: int) -> int:
    """Places before the first one; the larger half."""
    return (-size % order + 1) // 2


def check_grid(h: int, w: int, order: int) -> None:
    """Refuse a grid that has too few tokens to reflect.

    Raises:
        ValueError: a side is smaller than one or not larger than what is put before it.
    """
    for size in (h, w):
        if size < 1 or _padding(size, order) >= size:
            raise ValueError(
                f"spatial ({h}, {w}) is too small to be extended by reflection to a multiple of "
                f"order={order}"
            )
