"""Checks of arguments that many functions share, with errors that say what is allowed."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Side = Literal["left", "right"]
"""left: a subspace of the column space R^m; right: of the row space R^n of an (m, n) matrix."""


def check_side(side: str) -> None:
    """Raise ValueError unless `side` is "left" or "right"."""
    if side not in get_args(Side):
        raise ValueError(f'side must be "left" or "right", got {side!r}')


def check_matrix(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` has at least two dimensions."""
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (..., rows, columns), got {tuple(x.shape)}")


def check_rank(rank: int, size: int) -> None:
    """Raise ValueError unless 1 <= rank <= size."""
    if not 1 <= rank <= size:
        raise ValueError(f"rank must be between 1 and {size}, the size of its side, got {rank}")


def broadcast_batch(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The leading dimensions to which those of several operands broadcast."""
    return tuple(torch.broadcast_shapes(*shapes))


def side_size(x: Tensor, side: Side) -> int:
    """The dimension of the space that a subspace on `side` of `x` (..., m, n) lives in."""
    return x.shape[-2] if side == "left" else x.shape[-1]
