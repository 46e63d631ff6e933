"""Tensor GaLore: GaLore with one subspace per mode of convolution and higher-order weights."""

from __future__ import annotations

from dataclasses import replace

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Lift
from subspan.optim.parts.refresh import Every
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomizedSVD, resolve_finder
from subspan.subspaces.finders_tucker import HOOI


@recipe(
    "tensor_galore",
    paper="George et al.: Tensor-GaLore: Memory-Efficient Training via Gradient Tensor "
    "Decomposition, 2025, arXiv 2501.02379",
    lr=1e-2,
    memory="sum_i d_i r_i + 2 prod_i r_i for a weight with dimensions d_i; matrices as GaLore",
    evidence=(
        "law: the core of a tensor of low multilinear rank holds all of its energy; factors stay "
        "orthonormal",
        "limit: at full rank with SGD inside, the factors do not matter; two modes are GaLore's "
        "proj_type='full'",
    ),
    departures=(
        "The tensor class of the GaLore repository cannot run: its constructor rejects an "
        "argument that the optimizers pass, it never refreshes, and it maps the raw gradient back "
        "instead of the optimizer's step. This does what the paper says: refresh every gap, map "
        "Adam's step.",
        "Factors are warm-started: one sweep of higher-order orthogonal iteration per refresh.",
    ),
)
def TensorGaLore(
    *,
    rank: int | float | None = 0.2,
    update_proj_gap: int = 10,
    scale: float = 0.25,
    matrix_rank: int | float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    finder: str | Finder = "hooi",
) -> Composition:
    """Adam on the Tucker core of the gradient of every higher-order weight.

        R = G x_0 F_0^T x_1 F_1^T ...;  N = Adam(R);  W <- W - lr scale (N x_0 F_0 x_1 F_1 ...)

    Matrices are treated as by GaLore.

    Args:
        rank: of every mode, or a fraction of each of its dimensions (0.2 in the paper's Fourier
            neural operator); None for a plain group.
        update_proj_gap: steps between refreshes.
        scale: factor on the lifted update.
        matrix_rank: rank for matrices; None: as `rank`.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
        finder: "hooi", or a `Finder` of Tucker factors.
    """
    chosen = HOOI() if finder == "hooi" else resolve_finder(finder, HOOI())
    matrices = Composition(
        inner=Adam(betas, eps, "hf"),
        finder=RandomizedSVD(),
        rank=matrix_rank or rank or 1,
        refresh=Every(update_proj_gap),
        output=Lift(scale),
    )
    tensors = replace(matrices, finder=chosen, rank=rank or 1, proj_type="tucker")
    return replace(matrices, tensors=tensors)
