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
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU time, like the steps that the floor is compared with: another process does not count."""
    call()
    return statistics.median(timed(call).cpu for _ in range(repeats))


def product_seconds(m: int, n: int, r: int, repeats: int = 5) -> tuple[float, float]:
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
        min(_median_seconds(call, repeats) for call in project),
        min(_median_seconds(call, repeats) for call in lift),
    )


def bandwidth(array: Tensor, repeats: int = 3) -> float:
    """Bytes per second of scaling an array in place: one read and one write of it."""
    seconds = _median_seconds(lambda: array.mul_(1.0000001), repeats)
    return 2 * array.numel() * array.element_size() / seconds


@dataclass
class MachineRates:
    """Rates measured several times over a run; the floor uses the median of each."""

    bandwidths: list[float] = field(default_factory=list)
    products: dict[tuple[int, int, int], list[tuple[float, float]]] = field(default_factory=dict)
    # 512 MiB, far larger than a cache; kept, since mapping it anew takes longer than the scaling.
    _array: Tensor = field(default_factory=lambda: torch.ones(1 << 27), repr=False)

    def sample(self, shape: Shape, family: str) -> None:
        """Measure the bandwidth, and the products of one shape and method, again."""
        self.bandwidths.append(bandwidth(self._array))
        if not PRODUCTS.get(family):
            return
        rank = method_rank(family, shape)
        for m, n in sorted({(max(size), min(size)) for size in shape.projected()}):
            self.products.setdefault((m, n, rank), []).append(product_seconds(m, n, min(rank, n)))

    def floor_seconds(self, family: str, shape: Shape) -> tuple[float, float] | None:
        """(matrix products, memory) of one normal step, or None where no floor is stated."""
        if family not in PRODUCTS:
            return None
        rank = method_rank(family, shape)
        seconds = 0.0
        for size in shape.projected() if PRODUCTS[family] else []:
            samples = self.products[(max(size), min(size), rank)]
            seconds += statistics.median(s[0] for s in samples)
            if PRODUCTS[family] == 2:
                seconds += statistics.median(s[1] for s in samples)
        return seconds, step_bytes(family, shape) / statistics.median(self.bandwidths)

    def summary(self) -> dict[str, object]:
        """The measured rates, for the report."""
        products = []
        for (m, n, r), samples in sorted(self.products.items()):
            flops = 2 * m * n * min(r, n)
            project, lift = (statistics.median(s[i] for s in samples) for i in (0, 1))
            rates = {"project": flops / project, "lift": flops / lift}
            products.append({"m": m, "n": n, "rank": r, **rates})
        return {"bandwidth": statistics.median(self.bandwidths), "products": products}
