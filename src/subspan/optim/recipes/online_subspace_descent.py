"""Online Subspace Descent: GaLore whose projection is trained, too."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.activity import check_gap
from subspan.optim.parts.adafactor import Adafactor
from subspan.optim.parts.descent import Lion
from subspan.optim.parts.inner import Adam, Inner
from subspan.optim.parts.output import Lift, SignedLift
from subspan.optim.parts.refresh import Every, Refresh
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomOrthogonal, resolve_finder
from subspan.subspaces.finders_online import (
    AdafactorStep,
    AdamWStep,
    BasisOptimizer,
    LionStep,
    OnlinePCA,
    SGDStep,
)

_OPTIMIZERS: dict[str, type[BasisOptimizer]] = {
    "adamw": AdamWStep,
    "sgd": SGDStep,
    "lion": LionStep,
    "adafactor": AdafactorStep,
}


@recipe(
    "online_subspace_descent",
    paper="Liang, Liu, Chen, Liu: Memory-Efficient LLM Training with Online Subspace Descent, "
    "2024, arXiv 2408.12857",
    lr=1e-2,
    memory="rm + 2rn, + 2rm for the projection's AdamW (sgd 0, lion rm, adafactor r + m)",
    evidence=(
        "record: osd_adamw_p_{adamw,sgd,lion,adafactor}, osd_adamw_random, osd_lion_p_adamw",
        "record: the published formulas in float64, with the loss differentiated automatically",
        "limit: with projection_lr 0 the first subspace stays in force",
    ),
    departures=(
        "penalty, the paper's weight of ||P^T P - I||^2, defaults to 0: the code has no such term "
        "and the paper's value could not be verified.",
        "projection_lr=None is the code's 1 / update_proj_gap; a learning rate may be given.",
        "The projection's 8-bit Adam is storage={'first_moment': 'int8', 'second_moment': 'int8'}, "
        "which also holds the moments of the weights so.",
        "A zero gradient has no PCA loss; the code divides by its norm. The first basis waits for "
        "a gradient that is not zero.",
        "With inner='lion' and 'adafactor', weight decay comes before the step, with 'lion' in the "
        "code after it.",
    ),
)
def OnlineSubspaceDescent(
    *,
    rank: int | float | None = 128,
    scale: float = 0.25,
    projection_optimizer: str = "adamw",
    update_proj_gap: int = 200,
    projection_lr: float | None = None,
    penalty: float = 0.0,
    proj_type: str = "std",
    inner: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    finder: str | Finder = "online",
) -> Composition:
    """Adam in a subspace whose projection takes an optimizer step on an online PCA loss every step.

        R = P^T G;  N = Adam(R);  W <- W - lr scale P N
        P <- P - Opt(D),  D = derivative of ||P P^T g - g||^2 by P, g = G / ||G||

    P starts with the leading singular vectors of the first gradient and is not kept orthonormal.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        scale: factor on the lifted update.
        projection_optimizer: "adamw" (torch's defaults, weight decay 0.01 included), "sgd", "lion"
            or "adafactor"; "random" draws a new orthonormal basis every `update_proj_gap` steps.
        update_proj_gap: its inverse is the learning rate of the projection, which moves in every
            step; steps between new bases with "random".
        projection_lr: learning rate of the projection at the first `lr`, with which it varies;
            None: `1 / update_proj_gap`.
        penalty: weight of `||P^T P - I||^2` in the loss.
        proj_type: std, reverse_std, left or right.
        inner: "adamw", "adafactor", or "lion" (whose sign is taken after the lift).
        betas: averaging rates (adamw, lion; Lion's own are (0.9, 0.99)).
        eps: added to the root of the second moment before the bias correction (adamw).
        finder: "online", or any `Finder`.
    """
    check_gap("update_proj_gap", update_proj_gap)
    core, plain = _inner(inner, betas, eps)
    random = projection_optimizer == "random"
    if not random and projection_optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"projection_optimizer={projection_optimizer!r} must be one of "
            f"{', '.join(_OPTIMIZERS)}, random"
        )
    default: Finder = RandomOrthogonal()
    if not random:
        default = OnlinePCA(
            _OPTIMIZERS[projection_optimizer](),
            projection_lr if projection_lr is not None else 1.0 / update_proj_gap,
            penalty,
        )
    return Composition(
        inner=core,
        plain=plain,
        finder=default if finder == "online" else resolve_finder(finder, default),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap) if random else Refresh(),
        output=SignedLift() if inner == "lion" else Lift(scale),
    )


def _inner(inner: str, betas: tuple[float, float], eps: float) -> tuple[Inner, Inner]:
    """The inner optimizer on the coordinates, and the one for what is not projected."""
    if inner == "adamw":
        adam = Adam(betas, eps, "hf")
        return adam, adam
    if inner == "lion":
        return Lion(betas, signed=False), Lion(betas)
    if inner == "adafactor":
        return Adafactor(), Adafactor()
    raise ValueError(f"inner={inner!r} is not known: use adamw, adafactor or lion")
