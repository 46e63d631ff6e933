"""LDAdam: Adam in a subspace that moves at every step.

Moments are transported and errors fed back.
"""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Discard, ErrorFeedback
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import ProjectionAware
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, WarmPowerIteration, resolve_finder


@recipe(
    "ldadam",
    paper="Robert et al.: LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics, "
    "2024, arXiv 2410.16103",
    lr=1e-3,
    memory="rm + 2rn, + mn with error feedback",
    evidence=(
        "record: ldadamw_{ef,noef,ef_svd}",
        "law: the transport is the identity when the basis did not change",
    ),
    departures=(
        "The error is a buffer of its own; the code keeps it in .grad, where clearing, clipping or "
        "averaging destroys it.",
        "Bias corrections count each parameter's own steps, not the optimizer's.",
    ),
)
def LDAdam(
    *,
    rank: int | float | None = 16,
    rho: float = 0.908,
    betas: tuple[float, float] = (0.908, 0.99),
    eps: float = 1e-8,
    error_feedback: bool = True,
    proj_type: str = "std",
    finder: str | Finder = "power",
) -> Composition:
    """Adam in a subspace that follows gradient and momentum by one power iteration per step.

        A = G + E;  Q = orth(b (b^T Q_old)), b = rho lift_old(M) + (1 - rho) A
        moments are carried to Q statistically
        E = A - lift(R) + b1 / (1 - b1) (lift_old(M_old) - lift(M));  W <- W - lr lift(Adam(R))

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        rho: weight of the momentum in the matrix whose subspace is tracked.
        betas: averaging rates.
        eps: added to the root of the second moment after the bias correction.
        error_feedback: add what the compression of gradient and momentum lost to the next gradient.
        proj_type: std, reverse_std, left, right.
        finder: "power", or any `Finder`; `WarmPowerIteration(rho, exact=True)` takes the exact
            subspace of b.
    """
    return Composition(
        inner=Adam(betas, eps),
        finder=resolve_finder(finder, WarmPowerIteration(rho)),
        rank=rank or 1,
        proj_type=proj_type,
        tie="left",
        refresh=Every(1),
        transport=ProjectionAware(),
        remainder=ErrorFeedback() if error_feedback else Discard(),
    )
