"""Adafactor, and the factored second moment that it shares with Flora."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspan.optim.parts.inner import Direction, Inner, Rate, check_betas, check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

# Entries of a block of rows on the CPU, where it stays in the cache between calls, and elsewhere.
_BLOCK, _LARGE_BLOCK = 1 << 18, 1 << 22


@dataclass(frozen=True)
class Adafactor(Inner):
    """Adafactor with a given learning rate, as GaLore runs it on coordinates.

    Shazeer, Stern 2018, arXiv 1804.04235.

        b_t = 1 - t^decay_rate;  row, col <- EMA_{b_t} of the row and column means of R∘R + eps
        u = R (row / mean(row))^-1/2 col^-1/2;  u <- u / max(1, rms(u) / clip_threshold);  u <- lr u
        with beta1: m <- beta1 m + (1 - beta1) u, and m is the step

    Momentum is taken after the learning rate. Vectors keep an unfactored second moment.

    Args:
        beta1: rate of the first moment; None keeps none.
        eps: added to R∘R.
        clip_threshold: largest root mean square of u.
        decay_rate: negative exponent of the averaging rate.
    """

    beta1: float | None = None
    eps: float = 1e-30
    clip_threshold: float = 1.0
    decay_rate: float = -0.8

    def __post_init__(self) -> None:
        if self.beta1 is not None:
            check_betas((self.beta1, 0.0))
        check_non_negative(eps=self.eps, clip_threshold=self.clip_threshold)

    @property
    def first_moment(self) -> str | None:  # type: ignore[override]
        """The momentum, if there is one."""
        return "exp_avg" if self.beta1 is not None else None

    @property
    def momentum_weight(self) -> float:
        """beta1."""
        return self.beta1 or 0.0

    def momentum_correction(self, age: int) -> float:
        """1 / (1 - beta1^age)."""
        return 1.0 / (1.0 - self.momentum_weight**age)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Row and column means (one full moment for vectors) and the optional first moment."""
        first = () if self.beta1 is None else (StateDeclaration("exp_avg", "first_moment"),)
        return (*first, *factored_declarations(len(layout.coordinates) >= 2, "coordinate"))

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        value = factored_scaling(
            coordinates, state, age, self.decay_rate, self.eps, work.like(coordinates)
        )
        dims = (-2, -1) if "exp_avg_sq_row" in state else (-1,)
        rms = value.square().mean(dims, keepdim=True).sqrt_()
        value.mul_((rms / self.clip_threshold).clamp_(min=1.0).reciprocal_() * lr)
        if self.beta1 is not None:
            value.copy_(state["exp_avg"].lerp_(value, 1.0 - self.beta1))
        return Direction(value, 1.0)


def factored_declarations(
    is_matrix: bool, what: str, name: str = "exp_avg_sq"
) -> tuple[StateDeclaration, ...]:
    """Declarations of a factored second moment of the "coordinate"s or the "matrix" (`what`)."""
    if is_matrix:
        return (
            StateDeclaration(f"{name}_row", "second_moment", f"{what}_rows"),
            StateDeclaration(f"{name}_col", "second_moment", f"{what}_columns"),
        )
    return (StateDeclaration(name, "second_moment"),)


def factored_scaling(
    x: Tensor,
    state: dict[str, Any],
    age: int,
    decay_rate: float,
    eps: float,
    out: Tensor,
    name: str = "exp_avg_sq",
) -> Tensor:
    """`x` divided by the root of Adafactor's (factored) second moment.

    The moment's averages are updated in place.

    Args:
        x: `(..., m, n)`, or any shape when the state holds an unfactored moment.
        state: holds `{name}_row` and `{name}_col`, or `name`.
        age: 1-based step.
        decay_rate: the averaging rate is `1 - age**decay_rate`.
        eps: added to the squares.
        out: result and scratch, same shape as `x`.
        name: of the moment in the state.
    """
    weight = float(age) ** decay_rate
    if name in state:
        moment = state[name].lerp_(torch.mul(x, x, out=out).add_(eps), weight)
        return torch.rsqrt(moment, out=out).mul_(x)
    row, column = scale_factors(mean_squares(x, eps, out), state, weight, name)
    for rows in row_blocks(x):
        scale_rows(x, row, column, rows, out[..., rows, :])
    return out


def block_length(x: Tensor) -> int:
    """Rows of a block of `row_blocks`, unless it is the last."""
    entries = _BLOCK if x.device.type == "cpu" else _LARGE_BLOCK
    return max(1, entries * x.shape[-2] // max(1, x.numel()))


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Ranges of rows of `x` `(..., m, n)` whose temporaries stay in the cache, or fill a GPU."""
    m, length = x.shape[-2], block_length(x)
    for start in range(0, m, length):
        yield slice(start, min(start + length, m))


def mean_squares(x: Tensor, eps: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Means of `x∘x + eps` over the entries of every row, `(..., m)`, and column, `(..., n)`.

    Args:
        x: `(..., m, n)`.
        eps: see above.
        scratch: contiguous, with room for a block of rows; overwritten.
    """
    *lead, m, n = x.shape
    row, column = x.new_empty((*lead, m)), x.new_zeros((*lead, n))
    for rows in row_blocks(x):
        part = x[..., rows, :]
        squares = torch.mul(part, part, out=scratch.view(-1)[: part.numel()].view(part.shape))
        torch.sum(squares, -1, out=row[..., rows])
        column.add_(squares.sum(-2))
    return row.div_(n).add_(eps), column.div_(m).add_(eps)


def scale_factors(
    means: tuple[Tensor, Tensor], state: dict[str, Any], weight: float, name: str
) -> tuple[Tensor, Tensor]:
    """The factors per row, `(..., m, 1)`, and column, `(..., 1, n)`, of `factored_scaling`.

    Args:
        means: of the squares, as `mean_squares` gives them.
        state: holds the averages `{name}_row` and `{name}_col`, which take them up.
        weight: of the new means in the averages.
        name: of the moment in the state.
    """
    row = state[f"{name}_row"].lerp_(means[0], weight)
    column = state[f"{name}_col"].lerp_(means[1], weight)
    factor = (row / row.mean(-1, keepdim=True)).rsqrt_()
    return factor.unsqueeze(-1), column.rsqrt().unsqueeze(-2)


def scale_rows(x: Tensor, row: Tensor, column: Tensor, rows: slice, out: Tensor) -> Tensor:
    """Some rows of `x` times the factors that `scale_factors` gives, in `out`."""
    return torch.mul(x[..., rows, :], row[..., rows, :], out=out).mul_(column)
