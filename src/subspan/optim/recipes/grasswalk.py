"""GrassWalk and GrassJump: SubTrack++ in a subspace that moves at random."""

from __future__ import annotations

from typing import Literal

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import NormScaled
from subspan.optim.parts.transport import ProjectionAware
from subspan.optim.parts.unit_step import CorrectedAdam
from subspan.optim.recipes.subtrack import subspace_aware
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomOrthogonal, resolve_finder
from subspan.subspaces.finders_grassmann import GrassmannWalk

_PAPER = (
    "Rajabi, Nonta, Vajpayee, Rambhatla: Randomized Gradient Subspaces for Efficient Large "
    "Language Model Training, 2025, arXiv 2510.01878"
)
_DEPARTURES = (
    "Reconstructed from the abstract, reviews and summaries; no code is public. Everything but the "
    "basis is SubTrack++'s, with its options scale_residual and corrected_limit.",
)


@recipe(
    "grasswalk",
    paper=_PAPER,
    lr=1e-3,
    memory="rm + 2rn + 1",
    evidence=(
        "record: the formulas in float64, with recorded draws: ref_grasswalk_eta0.1, which reads "
        "them as SubTrack++'s (no official trajectory exists)",
        "law: the basis stays orthonormal over 1000 refreshes; the walk is the exponential map "
        "computed from the SVD of the direction",
        "limit: step_size 0 is one fixed subspace",
    ),
    departures=(
        *_DEPARTURES,
        "The direction is divided by its largest singular value, so that step_size is an angle; "
        "normalise=False takes it as drawn. The paper's step size is not known to us.",
        "The basis is made orthonormal again at every refresh.",
    ),
)
def GrassWalk(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    step_size: float = 0.1,
    normalise: bool = True,
    scale: float = 0.25,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    convention: Literal["hf", "torch"] = "hf",
    growth_limit: float | None = 1.01,
    scale_residual: bool = False,
    corrected_limit: bool = False,
    stagger: bool = False,
    finder: str | Finder = "grasswalk",
) -> Composition:
    """SubTrack++ whose subspace walks along random geodesics of the Grassmannian.

        X ~ N(0, 1);  H = X - S S^T X = U D V^T
        S <- (S V cos(step_size D) + U sin(step_size D)) V^T

    The first basis holds the leading singular vectors of the first gradient.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes.
        step_size: largest angle of a refresh, in radians (half pi leaves nothing of the old
            subspace); without `normalise`, radians per unit of D, whose entries are about sqrt(d).
        normalise: divide the direction by its largest singular value.
        scale: factor on the lifted update.
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment.
        convention: place of eps and decay, "hf" (eps before the bias correction, decay after the
            step) or "torch" (the other way round).
        growth_limit: largest growth of the residual's norm per step; None for no limiter.
        scale_residual: multiply the residual with `scale`, too.
        corrected_limit: apply the limiter after Adam's bias corrections.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "grasswalk", or any `Finder`.
    """
    return subspace_aware(
        resolve_finder(finder, GrassmannWalk(step_size, normalise)),
        ProjectionAware(),
        NormScaled(growth_limit, scaled=False),
        (CorrectedAdam if corrected_limit else Adam)(betas, eps, convention),
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        scale_residual=scale_residual,
        proj_type=proj_type,
        stagger=stagger,
    )


@recipe(
    "grassjump",
    paper=_PAPER,
    lr=1e-3,
    memory="rm + 2rn + 1; 2rn + 1 with storage={'basis': 'seed'}",
    evidence=(
        "record: the formulas in float64, with recorded draws: ref_grassjump, which reads them as "
        "SubTrack++'s (no official trajectory exists)",
        "law: the basis is orthonormal; one drawn again from its seed gives the same run",
    ),
    departures=(
        *_DEPARTURES,
        "The first basis is random, too; the gradient is never decomposed.",
    ),
)
def GrassJump(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    convention: Literal["hf", "torch"] = "hf",
    growth_limit: float | None = 1.01,
    scale_residual: bool = False,
    corrected_limit: bool = False,
    stagger: bool = False,
    finder: str | Finder = "orthogonal",
) -> Composition:
    """SubTrack++ in a subspace that jumps: a fresh random orthonormal basis at every refresh.

    The basis is the Q of the QR of a Gaussian matrix; the moments are carried over as far as the
    two subspaces overlap.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes.
        scale: factor on the lifted update.
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment.
        convention: place of eps and decay, "hf" (eps before the bias correction, decay after the
            step) or "torch" (the other way round).
        growth_limit: largest growth of the residual's norm per step; None for no limiter.
        scale_residual: multiply the residual with `scale`, too.
        corrected_limit: apply the limiter after Adam's bias corrections.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "orthogonal", or any `Finder`.
    """
    return subspace_aware(
        resolve_finder(finder, RandomOrthogonal()),
        ProjectionAware(),
        NormScaled(growth_limit, scaled=False),
        (CorrectedAdam if corrected_limit else Adam)(betas, eps, convention),
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        scale_residual=scale_residual,
        proj_type=proj_type,
        stagger=stagger,
    )
