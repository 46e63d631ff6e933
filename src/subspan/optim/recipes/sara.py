"""SARA: GaLore or Fira in a subspace of singular vectors drawn by importance."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.output import Discard, Lift, NormScaled
from subspan.optim.parts.refresh import Every
from subspan.optim.recipes.galore import galore_inner
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, resolve_finder
from subspan.subspaces.finders_sampled import ImportanceSampledSVD


@recipe(
    "sara",
    paper="Zhang et al.: Breaking the Frozen Subspace: Importance Sampling for Low-Rank "
    "Optimization in LLM Pretraining, 2025, arXiv 2502.05790",
    lr=1e-2,
    memory="rm + 2rn (+ 1 with base='fira')",
    evidence=(
        "record: the formulas in float64, with recorded draws: ref_sara_galore_adam (no official "
        "trajectory exists)",
        "law: inclusion frequencies are those of successive draws without replacement; the basis "
        "consists of singular vectors in decreasing order",
        "limit: at full rank nothing is left to draw, and it is GaLore with exact vectors",
    ),
    departures=(
        "Reconstructed from the abstract and summaries; no code is public.",
        "The drawn vectors keep the order of their singular values, so that kept moments of large "
        "ones stay in their slots.",
        "A vector drawn again in its slot keeps its sign; others have a positive largest entry.",
        "Where the gradient has rank below r, all its singular vectors are taken and random others "
        "complete the basis.",
        "Not related to SaRA, the fine-tuning of small weights.",
    ),
)
def SARA(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    base: str = "galore",
    proj_type: str = "std",
    inner: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    correct_bias: bool = True,
    convention: str = "hf",
    beta1: float | None = None,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    growth_limit: float | None = 1.01,
    stagger: bool = False,
    finder: str | Finder = "sara",
) -> Composition:
    """GaLore (or Fira) whose subspace is a weighted draw instead of the r leading vectors.

        G = U diag(s) V^T;  r different i drawn with weights s_i / sum(s);  S = U_i
        R = project(G);  W <- W - lr (scale lift(Adam(R)) [+ Fira's residual])

    The leading subspace of a gradient hardly changes during training; a draw keeps it moving. The
    moments are kept over a refresh.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes, each of which decomposes the whole gradient.
        scale: factor on the lifted update.
        base: "galore" drops the residual, "fira" adds it back, scaled.
        proj_type: std compresses the smaller dimension; reverse_std, left, right, full.
        inner: "adamw" or "adafactor".
        betas: averaging rates (adamw).
        eps: added to the root of the second moment; None: 1e-6 ("hf"), 1e-8 otherwise (adamw).
        correct_bias: correct the moments' bias (adamw).
        convention: place of eps and decay, "hf" (eps before the bias correction, decay after the
            step), "torch" (the other way round) or "bitsandbytes" (adamw).
        beta1: rate of the first moment (adafactor); None keeps none.
        clip_threshold: largest root mean square of the step inside the subspace (adafactor).
        decay_rate: exponent of the second moment's rate (adafactor).
        growth_limit: largest growth of the residual's norm per step (fira); None for no limiter.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "sara", or any `Finder`.

    Raises:
        ValueError: if `base` is neither "galore" nor "fira".
    """
    if base not in ("galore", "fira"):
        raise ValueError(f"base={base!r} must be 'galore' or 'fira'")
    core, plain = galore_inner(
        inner, betas, eps, correct_bias, convention, beta1, clip_threshold, decay_rate
    )
    return Composition(
        inner=core,
        plain=plain,
        finder=resolve_finder(finder, ImportanceSampledSVD()),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, stagger=stagger),
        output=Lift(scale),
        remainder=NormScaled(growth_limit) if base == "fira" else Discard(),
    )
