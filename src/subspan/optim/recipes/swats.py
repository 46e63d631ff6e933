"""SWATS: Adam first, SGD with a learning rate found by the way afterwards."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.swats import ScaledMomentum, WatchedAdam
from subspan.optim.registry import recipe


@recipe(
    "swats",
    paper="Keskar, Socher: Improving Generalization Performance by Switching from Adam to SGD, "
    "2017, arXiv 1712.07628",
    lr=1e-3,
    memory="2mn before the switch, mn after it",
    evidence=(
        "record: swats_third_party (Adam phase; there is no official code)",
        "law: on a quadratic with a settled ratio the rule switches at the step, and with the "
        "learning rate, of a literal transcription",
        "limit: tolerance 0 never switches, which is Adam",
    ),
    departures=(
        "Rates are counted where there is one: the bias of their average is corrected by their "
        "number, not by that of steps with zero gradients among them.",
        "A negative learning rate is never taken.",
        "After the switch the learning rate is sgd_lr lr / (lr at the switch), so a schedule goes "
        "on as before.",
        "Weight decay is decoupled in both phases, with the group's own lr.",
    ),
)
def SWATS(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    switch_tolerance: float = 1e-9,
    relative_tolerance: float = 0.0,
    min_steps: int = 2,
    granularity: str = "network",
) -> Composition:
    """Adam until the SGD learning rate that would do the same has settled; then SGD with it.

        rate = <p, p> / -<p, g> of Adam's step p and the gradient g;  its bias-corrected average
        within `switch_tolerance` of it: W <- W - (1 - b1) average M, M <- b1 M + G from M = 0

    The published test is absolute and so strict that it mostly waits for chance in noisy problems;
    small ones may need a `relative_tolerance` of 1e-2, with `min_steps` against an early accident.
    Optimizer state halves at the switch.

    Args:
        betas: averaging rates of Adam; the first is SGD's momentum, the second averages the rates.
        eps: added to the root of the second moment before the bias correction.
        switch_tolerance: largest difference between the average and the latest rate.
        relative_tolerance: share of the average that is added to it.
        min_steps: no switch before so many steps.
        granularity: "network" takes p and g over all parameters (across param groups with the same
            options), as in the paper; "tensor" decides for each parameter alone, as third-party
            codes do.
    """
    watched = WatchedAdam(
        Adam(betas, eps, "hf"),
        switch_tolerance,
        relative_tolerance,
        min_steps,
        granularity,  # type: ignore[arg-type]
    )
    return Composition(inner=watched, idle=Composition(ScaledMomentum(betas[0])))
