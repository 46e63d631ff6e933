"""What the machine does at one moment, in the units of `floors.py`, and the floor that follows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.floors import matrices, step_bytes
from benchmarks.measure import timed
from benchmarks.shapes import Shape


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU time, like the steps that the floor is compared with: another process does not count."""
    return statistics.median(timed(call).cpu for _ in range(repeats))


def _product_seconds(m: int, n: int, r: int, repeats: int = 4) -> tuple[float, float]:
    """(project, lift) of one m x n matrix in cached buffers, each in its fastest layout."""
    long, short = max(m, n), min(m, n)
    g, c, out = torch.randn(long, short), torch.randn(long, r), torch.empty(long, short)
    basis, coordinates = torch.randn(short, r), torch.empty(long, r)
    basis_t, coordinates_t = basis.t().contiguous(), torch.empty(r, long)
    project = [
        lambda: torch.mm(g, basis, out=coordinates),
        lambda: torch.mm(g, basis_t.t(), out=coordinates),
        lambda: torch.mm(basis_t, g.t(), out=coordinates_t),
    ]
    lift = [
        lambda: torch.mm(c, basis_t, out=out),
        lambda: torch.mm(c, basis.t(), out=out),
    ]
    return (
        min(_cpu_seconds(call, repeats) for call in project),
        min(_cpu_seconds(call, repeats) for call in lift),
    )


def _square_rate(side: int) -> float:
    """FLOPs per second of a product of two square matrices in cached buffers."""
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    count = max(1, 512**3 // side**3)  # long enough for the clock

    def products() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return count * 2 * side**3 / _cpu_seconds(products, 4)


def _transform_seconds(m: int, n: int) -> float:
    """Multiplying with a square cosine matrix: a product, or the FFT inside a fast one."""
    long, short = max(m, n), min(m, n)
    g, q, out = torch.randn(long, short), torch.randn(short, short), torch.empty(long, short)
    spectrum = torch.empty(long, short // 2 + 1, dtype=torch.complex64)
    return min(
        _cpu_seconds(lambda: torch.mm(g, q, out=out), 4),
        _cpu_seconds(lambda: torch.fft.rfft(g, out=spectrum), 4),
    )


@dataclass(frozen=True)
class Rates:
    """What the machine does at one moment: bytes per second, and seconds of the products.

    Bandwidth is that of scaling an array in place, one read and one write. `products` has seconds
    of (project, lift) by (m, n, rank), `squares` FLOPs per second by side, `transforms` seconds by
    (m, n).
    """

    bandwidth: float
    products: dict[tuple[int, int, int], tuple[float, float]]
    squares: dict[int, float]
    transforms: dict[tuple[int, int], float]

    def floor(self, method: str, shape: Shape) -> tuple[float, float]:
        """Seconds of (matrix products, memory traffic) of one normal step."""
        seconds = 0.0
        for share, work, m, n, r in matrices(method, shape):
            size = (max(m, n), min(m, n))
            if any(work.products):
                project, lift = self.products[(*size, r)]
                projections, lifts = work.products
                seconds += share * (projections * project + lifts * lift)
            if work.transform:
                seconds += share * self.transforms[size]
            flops, side = work.square_flops(m, n, r)
            if flops:
                seconds += share * flops / self.squares[side]
        return seconds, step_bytes(method, shape) / self.bandwidth


class Machine:
    """Measures rates; meant to take its turn among the optimizers, once per round."""

    def __init__(self) -> None:
        # 512 MiB, far larger than a cache; kept, since mapping it anew takes longer than scaling.
        self._array = torch.ones(1 << 27)

    def rates(self, shape: Shape, methods: Iterable[str]) -> Rates:
        """The bandwidth, and what the floors of some methods need, now."""
        seconds = timed(lambda: self._array.mul_(1.0000001)).cpu
        products, squares, transforms = set(), set(), set()
        for method in methods:
            for _, work, m, n, r in matrices(method, shape):
                size = (max(m, n), min(m, n))
                if any(work.products):
                    products.add((*size, r))
                if work.transform:
                    transforms.add(size)
                flops, side = work.square_flops(m, n, r)
                if flops:
                    squares.add(side)
        return Rates(
            2 * self._array.numel() * 4 / seconds,
            {key: _product_seconds(*key) for key in sorted(products)},
            {side: _square_rate(side) for side in sorted(squares)},
            {size: _transform_seconds(*size) for size in sorted(transforms)},
        )
