"""What a step of each method cannot avoid on this machine: matrix products plus memory traffic.

floor = sum of the unavoidable products at the measured fp32 rate of their shape
        + unavoidable bytes / measured bandwidth.

The two are added because one thread does them one after the other. Per projected m x n matrix with
rank r: P = 2mnr FLOPs, long = max(m,n), short = min(m,n), c = r*long coordinates, b = r*short basis
elements, NS(a,l) = five Newton-Schulz steps of 4a²l + 2a³ FLOPs each on an a x l matrix:

method                    products                       bytes
AdamW, SWATS              none                           28 mn (read w, g, m, v; write w, m, v)
SGD with momentum         none                           20 mn
AdamW 8-bit, 4-bit        none                           16.06 mn, 14.06 mn
GaLore, GaLore 2, SARA,   2P: project, lift              12 mn (read g; read and write w)
  COAP, Tensor-GaLore                                      + 16 c + 8 b
Fira                      2P. The residual needs no      as GaLore
                          third one: with an
                          orthonormal basis its column
                          norms follow from those of G
                          and of the coordinates, and
                          lift(N) + phi*(G - lift(R))
                          = lift(N - phi*R) + phi*G
APOLLO                    P: project; never lifted       16 mn (g is read again to be scaled)
                                                           + 16 c
GaLore 8-bit, COAP 8-bit  2P                             12 mn + 4.06 c + 8 b
Q-GaLore                  2P                             6.04 mn (int8 weights; 12 with fp32)
                                                           + 4.06 c + 1.04 b
GaLore+                   (2 + density) P: the           as GaLore
                          residual's chosen entries
SubTrack++, GrassWalk,    2P, as Fira                    16 mn + 16 c + 8 b
  GrassJump
Online Subspace Descent   3P: one more for the basis,    16 mn + 16 c + 32 b
                          at every step
DCT-AdamW at a gap        2P                             12 mn + 16 c + 8 b
  with error feedback     2P + G Q, by a product of      20 mn + 16 c
                          (short/r) P or an FFT,
                          whichever is faster; the
                          coordinates are among it
Trion                     the same + NS(r,long)          20 mn
LDAdam                    6P: three projections (two     20 mn + 16 c + 16 b
                          of the power iteration),
                          three lifts (gradient,
                          momentum, step)
Flora                     2P                             16 mn + 8 c
FRUGAL blocks             none                           28 mn of a quarter, 12 mn of the others
FRUGAL svd                3P: the residual's signs       16 mn + 16 c + 8 b
                          need a lift of their own
Subset-Norm               none                           20 mn + 8 long
Subspace-Momentum         2P                             24 mn + 8 c + 8 b
  with Subset-Norm        2P                             16 mn + 8 c + 8 b + 8 long
GUM, low-rank layers      2P + NS(r,long)                12 mn + 8 c + 8 b
  layers at full size     2P + NS(short,long)            24 mn
AuON                      none                           20 mn
Hybrid-AuON, Muon         NS(short,long)                 20 mn
FISMO                     8mn(m+n) + NS(short,long)      20 mn + 12 (m² + n²)
Polynomial, degree 2      2mn*short for its curvature    12 mn
                          and for each degree
BAdam                     none                           28 mn of the active block

Parameters that are not projected cost AdamW's 28 bytes per element (20 for SGD, 16.06 and 14.06
with 8 and 4-bit states). What happens at refreshes only is not part of a floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.shapes import Shape

_NEWTON_SCHULZ_STEPS = 5
_POLYNOMIAL_DEGREE = 2
_GUM_FULL_SIZE_LAYERS = 2
_FRUGAL_DENSITY = 0.25
_SPARSE_SHARE = 0.01  # of GaLore+'s residual
# Per code of 256 that share them: a float32 scale; of weights and bases a byte of zero as well.
_SCALE, _AFFINE = 4 / 256, 5 / 256
_INT8, _INT4 = 4 * (1 + _SCALE), 4 * (0.5 + _SCALE)  # both moments, read and written
_INT8_WEIGHT = 4 + 2 * (1 + _AFFINE)  # read g; read and write w
_INT4_BASIS = 2 * (0.5 + _AFFINE)  # read for each product


def _newton_schulz(a: int, length: int) -> int:
    return _NEWTON_SCHULZ_STEPS * (4 * a * a * length + 2 * a**3)


@dataclass(frozen=True)
class Work:
    """One step on an m x n matrix, and on an element that is not projected.

    Args:
        full: bytes per element of the matrix.
        coordinates: bytes per low-rank coordinate.
        basis: bytes per element of the basis.
        vector: bytes per entry of the long dimension.
        corners: bytes per entry of an m x m and an n x n matrix.
        products: how many of 2mnr FLOPs, (with the basis, back to full size).
        transform: whether the matrix is multiplied with a square cosine matrix.
        square: the products of near-square matrices.
        plain: bytes per element of what is not projected.
    """

    full: float
    coordinates: float = 0.0
    basis: float = 0.0
    vector: float = 0.0
    corners: float = 0.0
    products: tuple[float, float] = (0.0, 0.0)
    transform: bool = False
    square: Literal["", "low-rank", "full", "fismo", "polynomial"] = ""
    plain: float = 28.0

    def bytes(self, m: int, n: int, r: int) -> float:
        """Bytes that have to be moved for one matrix."""
        long, short = max(m, n), min(m, n)
        low_rank = self.coordinates * r * long + self.basis * r * short
        return self.full * m * n + low_rank + self.vector * long + self.corners * (m * m + n * n)

    def square_flops(self, m: int, n: int, r: int) -> tuple[int, int]:
        """FLOPs of near-square products, and the side at whose rate they run."""
        long, short = max(m, n), min(m, n)
        if self.square == "low-rank":
            return _newton_schulz(r, long), r
        flops = 0 if self.square in ("", "polynomial") else _newton_schulz(short, long)
        if self.square == "fismo":
            flops += 8 * m * n * (m + n)
        elif self.square == "polynomial":
            flops += 2 * m * n * short * (1 + _POLYNOMIAL_DEGREE)
        return flops, short


_ONE_EACH = (1.0, 1.0)
_GALORE = Work(12, 16, 8, products=_ONE_EACH)
_8BIT = Work(12, _INT8, 8, products=_ONE_EACH, plain=12 + _INT8)
_APOLLO = Work(16, 16, products=(1, 0))
_ADAMW = Work(28)

WORK: dict[str, Work] = {
    "adamw": _ADAMW,
    "swats": _ADAMW,
    "badam": _ADAMW,  # of the active block
    "sgd": Work(20, plain=20),
    "adamw_8bit": Work(12 + _INT8, plain=12 + _INT8),
    "adamw_4bit": Work(12 + _INT4, plain=12 + _INT4),
    "galore": _GALORE,
    "coap": _GALORE,
    "dct_adamw": _GALORE,
    "fira": _GALORE,
    "galore_plus": Work(12, 16, 8, products=(1 + _SPARSE_SHARE, 1)),
    "subtrack": Work(16, 16, 8, products=_ONE_EACH),
    "apollo": _APOLLO,
    "apollo_mini": _APOLLO,
    "galore_8bit": _8BIT,
    "coap_8bit": _8BIT,
    "q_galore_fp32": Work(12, _INT8, _INT4_BASIS, products=_ONE_EACH, plain=12 + _INT8),
    "q_galore": Work(_INT8_WEIGHT, _INT8, _INT4_BASIS, products=_ONE_EACH, plain=12 + _INT8),
    "osd": Work(16, 16, 32, products=(2, 1)),
    "dct_adamw_ef": Work(20, 16, products=(0, 2), transform=True),
    "trion": Work(20, products=(0, 2), transform=True, square="low-rank"),
    "ldadam": Work(20, 16, 16, products=(3, 3)),
    "flora": Work(16, 8, products=_ONE_EACH),
    "frugal": _ADAMW,  # of a quarter
    "frugal_svd": Work(16, 16, 8, products=(1, 2)),
    "subset_norm": Work(20, vector=8),
    "subspace_momentum": Work(24, 8, 8, products=_ONE_EACH),
    "sn_sm": Work(16, 8, 8, vector=8, products=_ONE_EACH),
    "gum": Work(12, 8, 8, square="low-rank", products=_ONE_EACH),
    "auon": Work(20),
    "hybrid_auon": Work(20, square="full"),
    "muon": Work(20, square="full"),
    "fismo": Work(20, corners=12, square="fismo"),
    "polynomial": Work(12, square="polynomial"),
}


def work_of(method: str, shape: Shape) -> list[tuple[float, Work]]:
    """The kinds of work of a method, each with the share of the matrices that it is done on."""
    main = WORK[method]
    if method == "badam":
        return [(1 / shape.layers, main)]
    if method == "frugal":
        return [(_FRUGAL_DENSITY, main), (1 - _FRUGAL_DENSITY, Work(12))]
    if method == "gum":
        share = _GUM_FULL_SIZE_LAYERS / len(shape.projected())
        return [(1 - share, main), (share, Work(24, square="full", products=_ONE_EACH))]
    return [(1.0, main)]


def method_rank(method: str, shape: Shape) -> int:
    """The rank that a method's paper uses on this shape."""
    return 1 if method == "apollo_mini" else shape.rank


def matrices(method: str, shape: Shape) -> list[tuple[float, Work, int, int, int]]:
    """(share, work, m, n, rank) of everything that a method does to the projected matrices."""
    rank = method_rank(method, shape)
    return [
        (share, work, m, n, min(rank, m, n))
        for share, work in work_of(method, shape)
        for m, n in shape.projected()
    ]


def step_bytes(method: str, shape: Shape) -> int:
    """Bytes that one normal step has to move."""
    projected = sum(s * work.bytes(m, n, r) for s, work, m, n, r in matrices(method, shape))
    return round(projected + WORK[method].plain * shape.elements()[1])


def step_flops(method: str, shape: Shape) -> int:
    """Floating-point operations of the products; a transform is counted as a product."""
    total = 0.0
    for share, work, m, n, r in matrices(method, shape):
        low_rank = 2 * m * n * r * sum(work.products)
        transform = 2 * m * n * min(m, n) * work.transform
        total += share * (low_rank + transform + work.square_flops(m, n, r)[0])
    return round(total)
