"""Q-GaLore: GaLore with int4 bases, int8 moments, int8 weights, and refreshes that become rare."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Lift
from subspan.optim.parts.refresh import Lazy
from subspan.optim.registry import recipe
from subspan.subspaces.finders import SVD, Finder, resolve_finder


@recipe(
    "q_galore",
    paper="Zhang et al.: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive "
    "Low-Rank Gradients, 2024, arXiv 2407.08296",
    lr=1e-2,
    memory="rm at 4 bits + 2rn at 8 bits + m (leading vector) + 5 or 4 bytes per 256 elements",
    storage={"first_moment": "int8", "second_moment": "int8", "basis": "int4"},
    evidence=(
        "record: qgalore_sim_{nearest,stochastic,floatweights}, qgalore_projector_{int4,float}, "
        "qgalore_int8_weights",
        "limit: with storage='fp32', float weights and cos_threshold=1 it is GaLore",
    ),
    departures=(
        "The sign of the cosine is ignored: singular vectors have none, and the released test "
        "takes a flip for a moved subspace; signed_cosine=True keeps it.",
        "int4 codes are packed two to a byte; the released code spends a byte on each.",
        "Moments of small tensors are held in int8, too (the released code keeps those of fewer "
        "than 4096 elements in float32); storage='fp32' keeps all of them.",
        "int8 weights are `subspan.layers.quantise_linear`, made before the optimizer: any recipe "
        "trains them, and float weights train as well.",
    ),
)
def QGaLore(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    cos_threshold: float = 0.4,
    gamma_proj: float = 2.0,
    queue_size: int = 5,
    signed_cosine: bool = False,
    finder: str | Finder = "svd",
) -> Composition:
    """GaLore in few bits: 8-bit Adam, an int4 basis, a gap that doubles while a layer is steady.

        R = project(G), with the dequantised basis;  N = Adam(R);  W <- W - lr scale lift(N)

    At a refresh the leading singular vector is compared with the last one; when the mean of the
    last `queue_size` cosines reaches `cos_threshold`, the gap of that matrix is multiplied with
    `gamma_proj`. Weights that `subspan.layers.quantise_linear` holds in int8 are written back with
    stochastic rounding.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes at first.
        scale: factor on the lifted update.
        betas: averaging rates ((0.9, 0.95) in the pre-training scripts).
        eps: added to the root of the second moment after the bias correction.
        cos_threshold: see above.
        gamma_proj: see above.
        queue_size: see above.
        signed_cosine: see the departures.
        finder: "svd" (exact, as published), "randomized", or any `Finder`.
    """
    return Composition(
        inner=Adam(betas, eps, "bitsandbytes"),
        plain=Adam(betas, eps, "torch"),
        finder=resolve_finder(finder, SVD()),
        rank=rank or 1,
        refresh=Lazy(update_proj_gap, cos_threshold, gamma_proj, queue_size, signed=signed_cosine),
        output=Lift(scale),
    )
