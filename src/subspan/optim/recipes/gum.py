"""GUM: GaLore with Muon, made unbiased by a few layers that take turns at full size."""

from __future__ import annotations

from dataclasses import replace

from subspan.optim.composition import Composition
from subspan.optim.parts.activity import Sampled
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.muon import Adjust, Muon
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomizedSVD, resolve_finder


@recipe(
    "gum",
    paper="Pan, Luo, Liu, You, Zhang: Unbiased Gradient Low-Rank Projection, 2025, arXiv "
    "2510.17802",
    lr=1e-3,
    memory="rm + rn, of sampled layers rm + mn",
    evidence=(
        "record: ref_gum_q0.3, a float64 transcription of the published formulas (no official code "
        "is known)",
        "law: the expected input of both kinds of update is the gradient",
        "limit: with q = 0 it is GaLore with Muon",
    ),
    departures=(
        "Momentum rate, learning rate and shape factor are unverified: 0.95 without Nesterov's "
        "step, and adjust_lr_fn='match_rms_adamw', so that one learning rate serves Adam's "
        "parameters, too.",
        "gamma draws exactly so many layers per period, without replacement, which bounds memory; "
        "with q every layer is drawn by a coin of its own.",
        "The weights 1 / (1 - q) and 1 / q are constant within a period and cancel in "
        "Newton-Schulz; they are applied in the form with q only.",
        "The default finder is a randomised SVD; finder='svd' is the published one.",
    ),
)
def GUM(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    gamma: int = 2,
    q: float | None = None,
    momentum: float = 0.95,
    nesterov: bool = False,
    ns_steps: int = 5,
    adjust_lr_fn: str = "match_rms_adamw",
    proj_type: str = "std",
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    finder: str | Finder = "randomized",
) -> Composition:
    """Muon on the gradient's leading subspace, and for a few layers at a time on all the rest.

    At the start of every period each layer finds P and draws which of the two it does; the momentum
    M starts again.

        low rank:    M <- mu M + (1 - mu) P^T G / (1 - q);         W <- W - lr f P NewtonSchulz(M)
        full size:   M <- mu M + (1 - mu) (G - P P^T G) / q;       W <- W - lr f NewtonSchulz(M)

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps per period.
        gamma: how many layers of a param group are at full size in a period.
        q: if given instead, the probability with which each layer is.
        momentum: mu.
        nesterov: step along Nesterov's form of M.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: f for an m x n weight: "original" `sqrt(max(1, m/n))`, "match_rms_adamw"
            `0.2 sqrt(max(m, n))` or "none" for 1.
        proj_type: std, reverse_std, left or right.
        adam_betas: averaging rates of Adam, for what is no block matrix.
        adam_eps: added to the root of Adam's second moment.
        finder: "randomized", "svd", or any `Finder`.
    """
    if q is None and (not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 0):
        raise ValueError(f"gamma={gamma!r} must be an integer of at least 0")
    if q is not None and not 0.0 <= q <= 1.0:
        raise ValueError(f"q={q!r} must lie in [0, 1], or be None to use gamma")
    adjust: Adjust = adjust_lr_fn  # type: ignore[assignment]
    inside = Composition(
        inner=Muon(momentum, nesterov, ns_steps, adjust),
        finder=resolve_finder(finder, RandomizedSVD()),
        rank=rank or 1,
        proj_type=proj_type,
        gain=1.0 / (1.0 - q) if q is not None and q < 1.0 else 1.0,
    )
    outside = replace(
        inside,
        inner=Muon(momentum, nesterov, ns_steps, adjust, overwrites=True),
        complement=True,
        gain=1.0 / q if q else 1.0,
    )
    drawn = Sampled(update_proj_gap, share=q, number=gamma if q is None else None)
    return replace(inside, plain=Adam(adam_betas, adam_eps), activity=drawn, idle=outside)
