"""Fira: GaLore plus the discarded part of the gradient, rescaled."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Lift, NormScaled
from subspan.optim.parts.refresh import Every
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomizedSVD, resolve_finder


@recipe(
    "fira",
    paper="Chen et al.: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank "
    "Constraint?, 2024, arXiv 2410.01623",
    lr=1e-2,
    memory="rm + 2rn + 1",
    evidence=(
        "record: fira_adamw_{alpha1,alphafrac}",
        "law: the fused residual equals the explicit one",
        "limit: at full rank without a limiter it is GaLore",
    ),
    departures=(
        "residual='code' (default) subtracts alpha times the projection as the released code does; "
        "'paper' subtracts all of it.",
        "The column factors are taken along the basis, also for square full-rank matrices (the "
        "code guesses by shape).",
        "A zero gradient leaves the limiter's memory alone; the code lets the residual restart "
        "from 1e-8.",
        "Refresh and finder as for GaLore.",
    ),
)
def Fira(
    *,
    rank: int | float | None = 8,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    growth_limit: float | None = 1.01,
    residual: str = "code",
    stagger: bool = False,
    finder: str | Finder = "randomized",
) -> Composition:
    """GaLore whose discarded residual is added back, scaled as Adam scaled the coordinates.

    The scaling is column by column:

        phi_j = ||N_j|| / ||R_j||;  S = limit((G - alpha lift(R)) phi)
        W <- W - lr (alpha lift(N) + S)

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes.
        alpha: factor on the lifted update (0.25 for 60M-350M, 0.0625 for 1B and 7B in the paper's
            scripts).
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
        growth_limit: largest growth of the residual's norm per step; None for no limiter.
        residual: "code" or "paper", see the departures.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "randomized", "svd", or any `Finder`.
    """
    if residual not in ("code", "paper"):
        raise ValueError(f"residual={residual!r} must be 'code' or 'paper'")
    return Composition(
        inner=Adam(betas, eps, "hf"),
        finder=resolve_finder(finder, RandomizedSVD()),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, stagger=stagger),
        output=Lift(alpha),
        remainder=NormScaled(growth_limit, scaled=residual == "code"),
    )
