"""Names and values of trials; optuna's draws depend on what was told and on nothing else."""

from __future__ import annotations

import math
from math import inf
from pathlib import Path
from typing import Any

import pytest

from subspan.train.errors import JobError
from subspan.train.race.config import Range, SearchConfig
from subspan.train.race.trials import Drawn, distinct, draw, grid, points, trial_name

SPACE: dict[str, Any] = {
    "lr": Range(low=1e-4, high=1e-1),
    "rank": Range(low=2, high=64),
    "betas": [[0.9, 0.999], [0.9, 0.95]],
}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr": 0.01}, "lr-0.01"),
        ({"lr": 1e-05, "rank": 64}, "lr-1e-05-rank-64"),
        ({"method_options.alpha": 0.25}, "alpha-0.25"),
        ({"betas": [0.9, 0.95]}, "betas-_0.9__0.95_"),
        ({"project": "../x"}, "project-.._x"),
    ],
)
def test_trial_is_named_after_its_settings_in_safe_characters(
    settings: dict[str, Any], name: str
) -> None:
    assert trial_name(settings) == name


def test_grid_has_every_combination_and_ranges_have_evenly_spaced_points() -> None:
    space = {"lr": Range(low=1e-3, high=1e-1, points=3), "plain_lr": [0.1, 0.2]}
    cells = grid(space)
    assert len(cells) == 6
    assert [cell["lr"] for cell in cells[::2]] == [0.001, 0.01, 0.1]
    assert cells[1] == {"lr": 0.001, "plain_lr": 0.2}
    assert points(Range(low=0.0, high=1.0, log=False, points=5), "x") == [0, 0.25, 0.5, 0.75, 1]
    assert points(Range(low=8, high=64, points=4), "rank") == [8, 16, 32, 64]
    assert points(Range(low=1e-4, high=1e-2, points=1), "lr") == [1e-3]
    with pytest.raises(JobError, match="search of lr: a range needs points"):
        points(Range(low=1e-4, high=1e-2), "lr")


def test_trial_that_is_there_twice_is_refused() -> None:
    with pytest.raises(JobError, match=r"arm a: trial lr-0\.1 is there twice"):
        distinct([{"lr": 0.1}, {"lr": 0.10}], "a")


def ask(count: int, seed: int, told: Any = lambda settings: 1.0) -> list[dict[str, Any]]:
    search = SearchConfig(sampler="optuna", trials=count)
    before: list[tuple[dict[str, Any], float | None]] = []
    for _ in range(count):
        settings = draw(search, SPACE, before, (seed, "arm"))
        before.append((settings, told(settings)))
    return [settings for settings, _ in before]


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_repeat_for_a_seed_and_lie_in_the_space(seed: int) -> None:
    pytest.importorskip("optuna")
    first = ask(5, seed)
    assert ask(5, seed) == first
    assert ask(5, seed + 10) != first
    assert len({trial_name(settings) for settings in first}) == 5
    for settings in first:
        assert 1e-4 <= settings["lr"] <= 1e-1
        assert float(f"{settings['lr']:.3g}") == settings["lr"]
        assert isinstance(settings["rank"], int)
        assert 2 <= settings["rank"] <= 64
        assert settings["betas"] in SPACE["betas"]


def test_draws_move_towards_low_losses_and_bear_divergence_and_ignorance() -> None:
    pytest.importorskip("optuna")

    def bowl(settings: dict[str, Any]) -> float | None:
        if settings["lr"] > 0.05:
            return inf
        return None if settings["rank"] == 3 else math.log(settings["lr"] / 3e-3) ** 2

    trials = ask(30, 0, bowl)
    distances = [abs(math.log(t["lr"] / 3e-3)) for t in trials]
    assert sum(distances[-10:]) < 0.6 * sum(distances[:10])


def test_exhausted_space_is_one_line() -> None:
    pytest.importorskip("optuna")
    search = SearchConfig(sampler="optuna", trials=3)
    space: dict[str, Any] = {"lr": [0.1, 0.2]}
    before: list[Any] = [({"lr": 0.1}, 1.0), ({"lr": 0.2}, 2.0)]
    with pytest.raises(JobError, match="arm a: the search has only 2 different trials"):
        draw(search, space, before, (0, "a"))


def test_drawn_trials_are_kept_and_belong_to_their_search(tmp_path: Path) -> None:
    file = tmp_path / "trials.json"
    kept = Drawn(file, SPACE, 0)
    kept.add({"lr": 0.01})
    assert Drawn(file, SPACE, 0).settings == [{"lr": 0.01}]
    with pytest.raises(JobError, match="holds trials of another search"):
        Drawn(file, SPACE | {"lr": [0.1]}, 0)
    file.write_text("{")
    with pytest.raises(JobError, match="is damaged; delete it"):
        Drawn(file, SPACE, 0)
