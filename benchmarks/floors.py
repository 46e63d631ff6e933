"""What a step of each method cannot avoid on this machine: matrix products plus memory traffic.

floor = sum of the unavoidable products at the measured fp32 rate of their shape
        + unavoidable bytes / measured bandwidth.

The two are added because one thread does them one after the other. Per projected m x n matrix with
rank r, with c = r*max(m,n) coordinates and b = r*min(m,n) basis elements:

method        products of 2mnr FLOPs      bytes
AdamW         none                        28 mn (read w, g, m, v; write w, m, v)
GaLore        2: project, lift            12 mn (read g; read and write w) + 16 c + 8 b
Fira          2: project, lift. The       as GaLore
              residual needs no third
              one: with an orthonormal
              basis its column norms
              follow from those of G and
              of the coordinates, and
              lift(N) + phi*(G - lift(R))
              = lift(N - phi*R) + phi*G
APOLLO        1: project; never lifted    16 mn (g is read again to be scaled) + 16 c

All parameters that are not projected cost AdamW's 28 bytes per element.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure import timed
from benchmarks.shapes import Shape

PRODUCTS = {"adamw": 0, "galore": 2, "fira": 2, "apollo": 1, "apollo_mini": 1}
_ADAMW_BYTES = 28


def method_rank(family: str, shape: Shape) -> int:
    """The rank that a method's paper uses on this shape."""
    return 1 if family == "apollo_mini" else shape.rank


def step_bytes(family: str, shape: Shape) -> int:
    """Bytes that one normal step has to move."""
    projected, plain = shape.elements()
    coordinates, basis = shape.low_rank_elements(method_rank(family, shape))
    if family == "adamw":
        return _ADAMW_BYTES * (projected + plain)
    if family.startswith("apollo"):
        return _ADAMW_BYTES * plain + 16 * projected + 16 * coordinates
    return _ADAMW_BYTES * plain + 12 * projected + 16 * coordinates + 8 * basis


def step_flops(family: str, shape: Shape) -> int:
    """Floating-point operations of the products that one normal step cannot avoid."""
    rank = method_rank(family, shape)
    return PRODUCTS[family] * sum(2 * m * n * min(rank, m, n) for m, n in shape.projected())


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


@dataclass(frozen=True)
class Rates:
    """What the machine does at one moment: bytes per second, and seconds of the products.

    Bandwidth is that of scaling an array in place, one read and one write.
    """

    bandwidth: float
    products: dict[tuple[int, int, int], tuple[float, float]]

    def floor(self, family: str, shape: Shape) -> tuple[float, float]:
        """Seconds of (matrix products, memory traffic) of one normal step."""
        rank, count = method_rank(family, shape), PRODUCTS[family]
        seconds = 0.0
        for m, n in shape.projected() if count else []:
            project, lift = self.products[(max(m, n), min(m, n), rank)]
            seconds += project + (lift if count == 2 else 0.0)
        return seconds, step_bytes(family, shape) / self.bandwidth


class Machine:
    """Measures rates; meant to take its turn among the optimizers, once per round."""

    def __init__(self) -> None:
        # 512 MiB, far larger than a cache; kept, since mapping it anew takes longer than scaling.
        self._array = torch.ones(1 << 27)

    def rates(self, shape: Shape, family: str) -> Rates:
        """The bandwidth, and the products of one shape and method, now."""
        seconds = timed(lambda: self._array.mul_(1.0000001)).cpu
        products = {}
        if PRODUCTS.get(family):
            rank = method_rank(family, shape)
            for m, n in sorted({(max(size), min(size)) for size in shape.projected()}):
                products[(m, n, rank)] = _product_seconds(m, n, min(rank, n))
        return Rates(2 * self._array.numel() * 4 / seconds, products)
