"""APOLLO and APOLLO-Mini: the raw gradient, rescaled as Adam rescales a random projection of it."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import RescaledGradient
from subspan.optim.parts.refresh import Every
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, SeededGaussian, resolve_finder

_PAPER = "Zhu et al.: APOLLO: SGD-like Memory, AdamW-level Performance, 2024, arXiv 2412.05270"
_DEPARTURES = (
    "The random basis is drawn again from its seed in every step and not stored; with "
    "store_basis=True it is kept, as in the released code.",
    "The seed of a parameter is `seed` + its position + 1, so that runs with different seeds "
    "differ; seed=0 is the code's.",
    "All projection types work; the code's scaling assumes std.",
    "A zero gradient leaves the limiter's memory alone.",
)


def _apollo(
    rank: int | float | None,
    update_proj_gap: int,
    scale: float,
    scale_type: str,
    scale_front: bool,
    proj_type: str,
    betas: tuple[float, float],
    eps: float,
    growth_limit: float | None,
    finder: str | Finder,
    store_basis: bool,
) -> Composition:
    return Composition(
        inner=Adam(betas, eps, "hf"),
        finder=resolve_finder(finder, SeededGaussian(stored=store_basis)),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap),
        output=RescaledGradient(scale_type, scale, growth_limit, scale_front),  # type: ignore[arg-type]
    )


@recipe(
    "apollo",
    paper=_PAPER,
    lr=1e-2,
    memory="2rn + 1 (+ one seed)",
    evidence=(
        "record: apollo_channel_{random,svd,nolimiter}, apollo_mini_tensor{,_scalefront}",
        "law: the random basis equals the recorded draws",
    ),
    departures=_DEPARTURES,
)
def APOLLO(
    *,
    rank: int | float | None = 256,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    scale_type: str = "channel",
    scale_front: bool = False,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    growth_limit: float | None = 1.01,
    finder: str | Finder = "gaussian",
    store_basis: bool = False,
) -> Composition:
    """The raw gradient times a factor per channel, estimated by Adam on a random projection.

        R = project(G);  N = Adam(R);  phi_j = ||N_j|| / ||R_j||
        W <- W - lr sqrt(scale) limit(G phi)

    Args:
        rank: dimension of the random subspace, or a fraction of the smaller dimension; None for a
            plain group.
        update_proj_gap: steps between new random bases.
        scale: its square root multiplies the update.
        scale_type: "channel" or "tensor".
        scale_front: apply the scale before the growth limiter.
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
        growth_limit: largest growth of the update's norm per step; None for no limiter.
        finder: "gaussian" (from a seed), "svd", or any `Finder`.
        store_basis: keep the random basis between refreshes instead of drawing it in every step.
    """
    return _apollo(
        rank,
        update_proj_gap,
        scale,
        scale_type,
        scale_front,
        proj_type,
        betas,
        eps,
        growth_limit,
        finder,
        store_basis,
    )


@recipe(
    "apollo_mini",
    paper=_PAPER,
    lr=1e-2,
    memory="2n + 1 (+ one seed)",
    evidence=("record: apollo_mini_tensor{,_scalefront}",),
    departures=_DEPARTURES,
)
def APOLLOMini(
    *,
    rank: int | float | None = 1,
    update_proj_gap: int = 200,
    scale: float = 128.0,
    scale_type: str = "tensor",
    scale_front: bool = False,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    growth_limit: float | None = 1.01,
    finder: str | Finder = "gaussian",
    store_basis: bool = False,
) -> Composition:
    """APOLLO with a rank-1 projection and one factor per matrix: almost no state.

    Args:
        rank: dimension of the random subspace; None for a plain group.
        update_proj_gap: steps between new random bases.
        scale: its square root multiplies the update.
        scale_type: "tensor" or "channel".
        scale_front: apply the scale before the growth limiter (the paper's 60M and 130M runs).
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
        growth_limit: largest growth of the update's norm per step; None for no limiter.
        finder: "gaussian" (from a seed), "svd", or any `Finder`.
        store_basis: keep the random basis between refreshes instead of drawing it in every step.
    """
    return _apollo(
        rank,
        update_proj_gap,
        scale,
        scale_type,
        scale_front,
        proj_type,
        betas,
        eps,
        growth_limit,
        finder,
        store_basis,
    )
