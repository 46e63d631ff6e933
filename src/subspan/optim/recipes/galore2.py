"""GaLore 2: GaLore with randomised SVD, for pretraining at scale."""

from __future__ import annotations

from typing import Literal

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Lift
from subspan.optim.parts.refresh import Every
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomizedSVD, resolve_finder


@recipe(
    "galore2",
    paper="Su, Gu, Xu, Tian, Zhao: GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank "
    "Projection, 2025, arXiv 2504.20437",
    lr=5e-3,
    memory="rm + 2rn",
    evidence=(
        "record: the update rule is GaLore's: galore_adamw_std",
        "limit: with the same finder it is GaLore",
        "law: the basis captures at least 99.5 % of the exact one's energy",
    ),
    departures=(
        "Reconstructed from the abstract and summaries; no code is public.",
        "The sketch is warm-started from the previous basis.",
        "tie='right' (default) projects square matrices as GaLore's code does; 'left' as this "
        "paper's algorithm writes it.",
    ),
)
def GaLore2(
    *,
    rank: int | float | None = 1024,
    update_proj_gap: int = 500,
    scale: float = 0.125,
    proj_type: str = "std",
    tie: Literal["left", "right"] = "right",
    oversampling: int = 8,
    power_iterations: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    stagger: bool = False,
    finder: str | Finder = "randomized",
) -> Composition:
    """GaLore with the settings of a 7B model and a refresh by randomised SVD.

        Y = G Z;  Y <- G orth(G^T orth(Y)) (power_iterations times);  S = leading vectors of orth(Y)
        R = project(G);  W <- W - lr scale lift(Adam(R))

    Bases derive from `seed`, the parameter's position and its step, so equal replicas find equal
    ones. For other policies see the option `refresh` ("lazy", "staggered", "drift").

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes.
        scale: factor on the lifted update.
        proj_type: std compresses the smaller dimension; reverse_std, left, right, full.
        tie: side of square matrices.
        oversampling: columns of the sketch beyond `rank`.
        power_iterations: rounds beyond the first for a cold start; a warm start takes one fewer.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "randomized", "svd" (exact), "orthogonal" (random), or any `Finder`.

    Raises:
        ValueError: if `tie` is neither "left" nor "right".
    """
    if tie not in ("left", "right"):
        raise ValueError(f"tie={tie!r} must be 'left' or 'right'")
    return Composition(
        inner=Adam(betas, eps, "hf"),
        finder=resolve_finder(finder, RandomizedSVD(oversampling, power_iterations)),
        rank=rank or 1,
        proj_type=proj_type,
        tie=tie,
        refresh=Every(update_proj_gap, stagger=stagger),
        output=Lift(scale),
    )
