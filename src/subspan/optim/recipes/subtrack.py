"""SubTrack++: Adam in a subspace that follows the gradient along Grassmannian geodesics."""

from __future__ import annotations

from typing import Literal

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Discard, Lift, NormScaled, Remainder
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import FirstBasisAware, Keep, ProjectionAware
from subspan.optim.parts.unit_step import CorrectedAdam
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, resolve_finder
from subspan.subspaces.finders_grassmann import GrassmannTracking


@recipe(
    "subtrack_pp",
    paper="Rajabi, Nonta, Rambhatla: SubTrack++: Gradient Subspace Tracking for Scalable LLM "
    "Training, 2025, arXiv 2502.01586",
    lr=1e-3,
    memory="rm + 2rn + 1",
    evidence=(
        "record: with as_released=True, subtrackpp_full_eta{0.1,10} and "
        "subtrackpp_{tracking_only,aware_only,recovery_only,recovery_nolimiter}_eta0.1; without it "
        "the paper's formulas in float64, ref_subtrackpp_paper_eta0.1 (which reads them with "
        "scale_residual, corrected_limit and convention='torch')",
        "law: the basis stays orthonormal over 1000 refreshes; a short step lowers the projection "
        "error; the step is that of the explicit residual's SVD",
        "limit: step_size 0 is one fixed subspace",
    ),
    departures=(
        "as_released=True does what the released code does instead of what the paper says: bases "
        "on the right side (rows >= columns) never move; moments are turned from the very first "
        "basis and their variance is multiplied with 1 - b2, which shrinks it about a "
        "thousandfold at every refresh; the residual keeps the share 1 - scale of the gradient "
        "inside the subspace.",
        "The residual is not multiplied with `scale`, as in the code; scale_residual=True is the "
        "other reading of the paper. The growth limiter compares residuals before Adam's bias "
        "corrections, as in the code; corrected_limit=True compares them as applied.",
        "The basis is made orthonormal again at every refresh.",
        "A zero gradient leaves the limiter's memory alone.",
        "The code's iterative decrease of the step size is not offered.",
    ),
)
def SubTrackPP(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    step_size: float = 10.0,
    scale: float = 0.25,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    convention: Literal["hf", "torch"] = "hf",
    growth_limit: float | None = 1.01,
    projection_aware: bool = True,
    recovery_scaling: bool = True,
    scale_residual: bool = False,
    corrected_limit: bool = False,
    as_released: bool = False,
    stagger: bool = False,
    finder: str | Finder = "subtrack",
) -> Composition:
    """Adam in a subspace that turns a little towards the gradient instead of being found anew.

    A refresh walks along the geodesic of the projection error's leading descent direction. The
    moments are carried to the new basis, and the discarded part of the gradient is added back as
    Fira does.

        F = -2 (G - S A) A^T = s u v^T + ..., A = S^T G
        S <- S + (S v (cos(step_size s) - 1) - u sin(step_size s)) v^T
        W <- W - lr (scale lift(N) + limit((G - lift(R)) phi)),  N = Adam(R),  phi_j = |N_j| / |R_j|

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension (128 for 60M, 256
            for 130M and 350M, 512 for 1B and 3B, 1024 for 7B in the paper); None for a plain group.
        update_proj_gap: steps between refreshes (200; 500 at 7B).
        step_size: eta, radians per squared unit of the gradient. The paper's table says 10000, its
            scripts use 10 for pretraining and 0.001 to 10 for fine-tuning.
        scale: factor on the lifted update.
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment.
        convention: place of eps and decay, "hf" (eps before the bias correction, decay after the
            step; the released code) or "torch" (the other way round).
        growth_limit: largest growth of the residual's norm per step; None for no limiter.
        projection_aware: carry the moments to the new basis; False keeps them as they are.
        recovery_scaling: add the residual back; False drops it.
        scale_residual: multiply the residual with `scale`, too.
        corrected_limit: apply the limiter after Adam's bias corrections.
        as_released: do what the released code does; see the departures.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "subtrack", or any `Finder`.

    Raises:
        ValueError: if `as_released` is combined with another finder or `scale_residual`.
    """
    own = GrassmannTracking(step_size, as_released)
    chosen = resolve_finder(finder, own)
    transport: Keep = ProjectionAware()
    if as_released:
        if chosen is not own or scale_residual:
            raise ValueError(
                "as_released=True needs finder='subtrack' and scale_residual=False, not "
                f"{finder!r} and {scale_residual!r}"
            )
        transport = FirstBasisAware()
    return subspace_aware(
        chosen,
        transport if projection_aware else Keep(),
        NormScaled(growth_limit, scaled=as_released) if recovery_scaling else Discard(),
        (CorrectedAdam if corrected_limit else Adam)(betas, eps, convention),
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        scale_residual=scale_residual,
        proj_type=proj_type,
        stagger=stagger,
    )


def subspace_aware(
    finder: Finder,
    transport: Keep,
    remainder: Remainder,
    inner: Adam,
    *,
    rank: int | float | None,
    update_proj_gap: int,
    scale: float,
    scale_residual: bool,
    proj_type: str,
    stagger: bool,
) -> Composition:
    """SubTrack++ with any finder, as GrassWalk and GrassJump have it; arguments as there."""
    return Composition(
        inner=inner,
        plain=Adam(inner.betas, inner.eps, inner.convention),
        finder=finder,
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, stagger=stagger),
        transport=transport,
        output=Lift(1.0 if scale_residual else scale),
        remainder=remainder,
        lr_scale=scale if scale_residual else 1.0,
    )
