"""Flora: momentum stored as a random projection that is regenerated from a seed."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.descent import AverageMomentum
from subspan.optim.parts.inner import check_non_negative
from subspan.optim.parts.normaliser import FactoredRMS
from subspan.optim.parts.output import Stateless
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import Rotate
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, SeededGaussian, resolve_finder


@recipe(
    "flora",
    paper="Hao, Cao, Mou: Flora: Low-Rank Adapters Are Secretly Gradient Compressors, 2024, arXiv "
    "2402.03293",
    lr=1e-3,
    memory="rn + m + n",
    evidence=(
        "record: flora, flora_scaleparam, flora_quantized, flora_accumulation (projections)",
        "law: E[A A^T] = I",
    ),
    departures=(
        "beta1 defaults to 0.9: without momentum Flora's optimizer compresses nothing and is "
        "Adafactor.",
        "Which matrices are compressed is decided as for every recipe, not by an aspect ratio of "
        "at most 4.",
        "rank above the smaller dimension means full rank; the code then keeps full momentum.",
        "relative_step is not offered: the learning rate is always given.",
        "The momentum is carried over with the old and the new projection (the torch code; the JAX "
        "code uses the old one twice).",
    ),
)
def Flora(
    *,
    rank: int | float | None = 256,
    kappa: int = 1000,
    beta1: float = 0.9,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    scale_parameter: bool = True,
    finder: str | Finder = "gaussian",
) -> Composition:
    """Adafactor whose momentum lives in a random subspace that changes every kappa steps.

    The projection `A` is drawn from a seed.

        u = Adafactor(G);  U = (1 - b) u + b lift(M);  M <- b M + (1 - b) project(u)
        W <- W - lr clip(U)

    Args:
        rank: rows of the stored momentum, or a fraction of the smaller dimension; None for a plain
            group.
        kappa: steps between new projections.
        beta1: averaging rate of the momentum.
        eps: added to the squared gradient, and the smallest root mean square in `scale_parameter`.
        clip_threshold: largest root mean square of the update.
        decay_rate: exponent of the second moment's averaging rate.
        scale_parameter: multiply lr with max(eps[1], rms(W)).
        finder: "gaussian" (from a seed), or any `Finder`.
    """
    if len(tuple(eps)) != 2:
        raise ValueError(f"eps={eps!r} must be two numbers")
    check_non_negative(eps=eps[0], decay_floor=eps[1], clip_threshold=clip_threshold)
    return Composition(
        inner=AverageMomentum(beta1),
        finder=resolve_finder(finder, SeededGaussian(split=True)),
        rank=rank or 1,
        refresh=Every(kappa, phase=0),
        transport=Rotate(),
        remainder=Stateless("sgd", weight=1.0 - beta1, momentum_loss=beta1),
        normaliser=FactoredRMS(eps[0], decay_rate),
        parameter_scale=eps[1] if scale_parameter else None,
        clip_rms=clip_threshold,
    )
