"""Successive halving: places of the rungs, who goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.race.config import HalvingConfig
from subspan.train.race.halving import rung_steps, survivors

Settings = Callable[..., TrainConfig]


def test_rungs_are_at_the_evaluations_nearest_to_the_shares(settings: Settings) -> None:
    halving = HalvingConfig(rungs=[0.1, 0.3, 0.74])
    config = settings(steps=100, eval_every=8, warmup=0)
    assert rung_steps(halving, config) == [8, 32, 72]
    assert rung_steps(None, config) == []


@pytest.mark.parametrize("rungs", [[0.1, 0.11], [0.9, 0.99]])
def test_rungs_that_fall_together_are_refused_with_the_steps(
    settings: Settings, rungs: list[float]
) -> None:
    config = settings(steps=100, eval_every=20, warmup=0)
    with pytest.raises(JobError, match="lower eval_every or move the rungs"):
        rung_steps(HalvingConfig(rungs=rungs), config)


@pytest.mark.parametrize(
    ("count", "keep", "kept"), [(8, 0.5, 4), (9, 0.5, 5), (3, 0.1, 1), (30, 0.1, 3), (10, 0.3, 3)]
)
def test_share_of_all_trials_goes_on_rounded_up(count: int, keep: float, kept: int) -> None:
    scores = {number: float((number * 7) % count) for number in range(count)}
    best_first = sorted(scores, key=lambda number: scores[number])
    assert survivors(scores, keep) == best_first[:kept]


def test_failed_trials_count_but_never_go_on() -> None:
    scores = {"a": None, "b": 2.0, "c": None, "d": 1.0, "e": 3.0, "f": None}
    assert survivors(scores, 0.5) == ["d", "b", "e"]
    assert survivors({"a": None}, 0.5) == []


def test_of_equal_losses_the_earlier_trial_is_better() -> None:
    assert survivors({"a": 1.0, "b": 1.0, "c": 1.0}, 0.1) == ["a"]
