"""Successive halving: where the rungs are, and who goes on from them.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
2015 (arXiv 1502.07943): all trials get a share of the budget, the best of them more, until one is
left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.race.config import HalvingConfig

T = TypeVar("T")


def rung_steps(halving: HalvingConfig | None, config: TrainConfig) -> list[int]:
    """Steps of the rungs: the evaluations nearest to the shares of the run.

    Raises:
        JobError: two rungs, or a rung and the end, are at the same evaluation.
    """
    if halving is None:
        return []
    every, total = config.eval_steps, config.total_steps
    steps = [max(1, round(share * total / every)) * every for share in halving.rungs]
    if len({*steps, total}) <= len(steps) or steps[-1] > total:
        raise JobError(
            f"halving: rungs {halving.rungs} of {total} steps with an evaluation every {every} "
            f"steps are at steps {steps}, the end at {total}; lower eval_every or move the rungs"
        )
    return steps


def survivors(scores: Mapping[T, float | None], keep: float) -> list[T]:
    """The share `keep` (at least one) of all trials with the lowest scores, best first.

    Trials without a score failed: they count among all, but never survive. Of equal scores the
    earlier one is better.
    """
    scored = [(score, trial) for trial, score in scores.items() if score is not None]
    ranked = [trial for _, trial in sorted(scored, key=lambda pair: pair[0])]
    # The tolerance keeps 0.1 x 30 at 3.
    return ranked[: max(1, math.ceil(keep * len(scores) - 1e-9))]
