"""Trion: Muon on the cosines that carry most of the momentum."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.muon import Adjust, Muon, check_momentum
from subspan.optim.parts.output import ErrorFeedback
from subspan.optim.parts.refresh import Every
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, resolve_finder
from subspan.subspaces.finders_fixed import TopColumns

_FACTORS: dict[str, Adjust] = {
    "kj": "original",
    "kimi": "match_rms_adamw",
    "dion": "dion",
    "none": "none",
}


@recipe(
    "trion",
    paper="Modoranu et al.: FFT-based Dynamic Subspace Selection for Low-Rank Adaptive "
    "Optimization of Large Language Models, 2025, arXiv 2505.17967",
    lr=2e-2,
    memory="mn + r indices; one m x m matrix shared by all layers of a width",
    evidence=(
        "record: trion_{kj,dion} with as_released=True; the published formulas in float64",
        "limit: at full rank it is Muon without Nesterov's step",
    ),
    departures=(
        "Newton-Schulz runs in float32, and wide matrices use the same Q as tall ones. "
        "as_released=True: bfloat16, and the transpose of Q for wide matrices.",
        "The module does not run as published (three names are undefined); with its FFT, wide "
        "matrices are rebuilt from other vectors than they were projected on.",
        "What is not projected is trained by Adam with the same learning rate unless its param "
        "group sets one (3e-4 in the code).",
    ),
)
def Trion(
    *,
    rank: int | float | None = 128,
    momentum: float = 0.95,
    scaling_type: str = "kj",
    ns_steps: int = 5,
    matrix: str = "dct3",
    norm: int = 1,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_eps: float = 1e-10,
    as_released: bool = False,
    finder: str | Finder = "dct",
) -> Composition:
    """Newton-Schulz on the r cosines that carry most of the momentum; the rest stays in it.

        M <- M + G;  S = M Q;  I = the r columns of S with the largest norm;  R = S_I
        M <- M - (1 - mu) R Q_I^T;  W <- W (1 - lr weight_decay) - lr f NewtonSchulz(R) Q_I^T

    Args:
        rank: columns in use, or a fraction of the smaller dimension; None for a plain group.
        momentum: mu, the part of the projection that stays in M, in [0, 1).
        scaling_type: f for an m x n weight: "kj" `sqrt(max(1, m/n))`, "kimi" `0.2 sqrt(max(m, n))`,
            "dion" `sqrt(m/n)`, or "none" for 1.
        ns_steps: Newton-Schulz iterations.
        matrix: Q: "dct3" (the paper's), "dct2" (its transpose) or "random".
        norm: 1 or 2, of the columns of S.
        adam_betas: averaging rates of Adam.
        adam_eps: added to the root of Adam's second moment.
        as_released: see the departures.
        finder: "dct", or any `Finder`.
    """
    check_momentum(momentum)
    if scaling_type not in _FACTORS:
        raise ValueError(f"scaling_type={scaling_type!r} must be one of {', '.join(_FACTORS)}")
    columns = TopColumns(
        matrix,  # type: ignore[arg-type]
        norm,
        left="dct2" if as_released and matrix == "dct3" else None,
    )
    inner = Muon(
        0.0,
        nesterov=False,
        steps=ns_steps,
        adjust=_FACTORS[scaling_type],
        arithmetic="bfloat16" if as_released else "float32",
    )
    return Composition(
        inner=inner,
        plain=Adam(adam_betas, adam_eps),
        finder=resolve_finder(finder, columns),
        rank=rank or 1,
        refresh=Every(1),
        remainder=ErrorFeedback(momentum=False, share=1.0 - momentum),
    )
