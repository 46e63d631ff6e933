"""Subset-Norm, Subspace-Momentum, and both: fewer second and fewer first moments."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from subspan.optim.composition import Composition
from subspan.optim.parts import normaliser
from subspan.optim.parts.descent import SGD, AverageMomentum
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_betas
from subspan.optim.parts.output import PassThrough
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import Forget, Keep
from subspan.optim.parts.workspace import Workspace
from subspan.optim.registry import recipe
from subspan.subspaces.finders import (
    SVD,
    Finder,
    RandomCoordinates,
    RandomizedSVD,
    resolve_finder,
)
from subspan.subspaces.finders_fixed import TopColumns

Subset = int | Literal["heuristics"]

_PAPER = (
    "Nguyen, Nguyen: Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum "
    "with Convergence Guarantees, 2024, arXiv 2411.07120"
)
_FINDERS: dict[str, Finder] = {
    "randomized": RandomizedSVD(),
    "svd": SVD(),
    "uniform": RandomCoordinates(),
    "topk": TopColumns("identity", norm=2),
}
_DECAY = (
    "Weight decay comes before the step for every base but 'adamw'; in the code after it, a "
    "difference of lr^2 weight_decay."
)
_MOMENTUM = (
    "The default finder is a warm-started randomised SVD; projection='svd' is the published one.",
    "At a refresh the momentum starts from zero with that step's gradient. The code reads the old "
    "momentum once more, in the new basis, and drops the refresh step's gradient: "
    "as_released=True.",
)


@recipe(
    "subset_norm",
    paper=_PAPER,
    lr=1e-2,
    memory="mn + n (rmsprop: n)",
    evidence=(
        "record: snsm_{adamw,adagrad,rmsprop}_sn_heuristics, snsm_adamw_sn_{subset16,half_sqrt}, "
        "snsm_adamwsn_general; the published formulas in float64",
        "limit: subsets of one entry are Adam",
    ),
    departures=(_DECAY,),
)
def SubsetNorm(
    *,
    base: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    subset_size: Subset = "heuristics",
    everywhere: bool = False,
) -> Composition:
    """Adam with one second moment per row or column of a matrix, or per so many of its entries.

        M <- b1 M + (1 - b1) G;  v_i <- b2 v_i + (1 - b2) ||G_i||^2
        W_i <- W_i - lr sqrt(1 - b2^t) / (1 - b1^t) M_i / (sqrt(v_i) + eps)

    Sums over subsets are larger than single squares: learning rates are about ten times Adam's.

    Args:
        base: "adamw"; "adagrad" (v accumulates) or "rmsprop" (no momentum), without corrections.
        betas: averaging rates; "adagrad" takes the first, "rmsprop" the second.
        eps: added to the root of v.
        subset_size: "heuristics": the rows if m >= n, else the columns; n > 0: n consecutive
            entries; n < 0: `sqrt(mn) / |n|` of them. Sizes are lowered to a divisor of mn.
        everywhere: subsets also for embeddings, heads, norms and vectors, which otherwise keep one
            second moment per entry (of vectors "heuristics" always does).
    """
    return _compose(base, ("adamw", "adagrad", "rmsprop"), betas, eps, subset_size, everywhere)


@recipe(
    "subspace_momentum",
    paper=_PAPER,
    lr=5e-3,
    memory="mn + rm + rn (sgd: rm + rn)",
    evidence=(
        "record: snsm_adamw_sm_svd, snsm_sgd_sm_svd with as_released=True",
        "limit: at full rank it is the base optimizer",
    ),
    departures=(*_MOMENTUM, _DECAY),
)
def SubspaceMomentum(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    projection: str = "randomized",
    base: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    reset_momentum: bool = True,
    as_released: bool = False,
    finder: str | Finder | None = None,
) -> Composition:
    """Momentum inside a subspace, plain gradient descent outside it, in one step.

        R = project(G);  M <- b1 M + (1 - b1) R;  U = lift(M) + G - lift(R)
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) U / (sqrt(V) + eps)

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes, at steps 1, gap, 2 gap, ...
        projection: "randomized" or "svd" (leading singular vectors), "uniform" (random rows or
            columns, of which there are more) or "topk" (those of largest norm).
        base: "adamw"; "adagrad" (V accumulates) or "sgd" (no V), without corrections.
        betas: averaging rates; "adagrad" and "sgd" take the first.
        eps: added to the root of V.
        reset_momentum: start M from zero at a refresh; False keeps it as it is.
        as_released: see the departures.
        finder: replaces the projection's own finder.
    """
    made = _compose(base, ("adamw", "adagrad", "sgd"), betas, eps, 1, False)
    return _in_subspace(
        made, rank, update_proj_gap, projection, reset_momentum, as_released, finder
    )


@recipe(
    "subset_norm_subspace_momentum",
    paper=_PAPER,
    lr=5e-2,
    memory="rm + rn + n",
    evidence=(
        "record: snsm_adamw_snsm_{svd,uniform,topk}, snsm_adagrad_snsm_svd with as_released=True; "
        "the published formulas in float64",
    ),
    departures=(*_MOMENTUM, _DECAY),
)
def AdamSNSM(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    projection: str = "randomized",
    base: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    subset_size: Subset = "heuristics",
    reset_momentum: bool = True,
    as_released: bool = False,
    finder: str | Finder | None = None,
) -> Composition:
    """Subset-Norm and Subspace-Momentum together, with a fifth of Adam's state.

        R = project(G);  M <- b1 M + (1 - b1) R;  v_i <- b2 v_i + (1 - b2) ||G_i||^2
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) (lift(M) + G - lift(R)) / (sqrt(v) + eps)

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes, at steps 1, gap, 2 gap, ...
        projection: see `SubspaceMomentum`.
        base: "adamw", or "adagrad" (AdaGradSNSM: v accumulates, no corrections).
        betas: averaging rates; "adagrad" takes the first.
        eps: added to the root of v.
        subset_size: see `SubsetNorm`.
        reset_momentum: start M from zero at a refresh; False keeps it as it is.
        as_released: see the departures.
        finder: replaces the projection's own finder.
    """
    made = _compose(base, ("adamw", "adagrad"), betas, eps, subset_size, False)
    return _in_subspace(
        made, rank, update_proj_gap, projection, reset_momentum, as_released, finder
    )


def _compose(
    base: str,
    allowed: Collection[str],
    betas: tuple[float, float],
    eps: float,
    subset_size: Subset,
    everywhere: bool,
) -> Composition:
    """The base optimizer with its second moment per subset."""
    if base not in allowed:
        raise ValueError(f"base={base!r} must be one of {', '.join(allowed)}")
    check_betas(betas)
    b1, b2 = betas
    corrected = base == "adamw"
    inner: Inner = AverageMomentum(b1, b2 if corrected else None)
    if base == "rmsprop":
        inner = SGD()
    rate = 1.0 if base == "adagrad" else b2
    divisor = normaliser.SubsetNorm(rate, eps, subset_size, everywhere)
    fused = corrected and not everywhere
    return Composition(
        inner=inner,
        plain=Adam(betas, eps, "hf") if fused else inner,
        normaliser=None if base == "sgd" else divisor,
        normalises_all=not fused,
    )


def _in_subspace(
    made: Composition,
    rank: int | float | None,
    gap: int,
    projection: str,
    reset: bool,
    as_released: bool,
    finder: str | Finder | None,
) -> Composition:
    """The same with its momentum in a subspace."""
    if projection not in _FINDERS:
        raise ValueError(f"projection={projection!r} must be one of {', '.join(_FINDERS)}")
    default, inner = _FINDERS[projection], made.inner
    assert isinstance(inner, AverageMomentum)
    # With a refresh at every step the late restart is the ordinary one.
    late = reset and as_released and gap > 1
    return Composition(
        inner=_LateRestart(inner.beta, inner.beta2) if late else inner,
        plain=made.plain,
        finder=resolve_finder(default if finder is None else finder, default),
        rank=rank or 1,
        proj_type="reverse_std" if default.form == "coordinates" else "std",
        refresh=Every(gap, phase=0),
        transport=Forget() if reset and not late else Keep(),
        remainder=PassThrough(),
        normaliser=made.normaliser,
        normalises_all=made.normalises_all,
    )


@dataclass(frozen=True)
class _LateRestart(AverageMomentum):
    """Momentum that starts again one step after a refresh instead of on it, as released."""

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        moment: Tensor = state["exp_avg"]
        rows = [moment] if len(state["step"]) == 1 else list(moment.unbind(0))
        for row, found, last in zip(rows, state["refreshed"], state["step"], strict=True):
            if found == last > 1:
                row.zero_()
        return super().update(coordinates, state, age, lr, work)
