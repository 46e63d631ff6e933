"""Every recipe on several ranks takes the steps of one process, also when their number changes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from sharded_problem import (
    FIRST_SAVE,
    SECOND_SAVE,
    STEPS,
    Weights,
    alone,
    compare_on_given,
    difference,
    finish,
    resume,
    train,
)
from worker_pool import Pool

from subspan.optim import lookup

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROUNDING = 6e-8  # half a unit in the last place of float32
FOUR_TWO_ONE = (4,) * FIRST_SAVE + (2,) * (SECOND_SAVE - FIRST_SAVE) + (1,) * (STEPS - SECOND_SAVE)


class Runs:
    """Runs that several tests look at, each made once."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self._alone = cache(alone)

    @cache  # noqa: B019  (lives as long as the session)
    def four(self, method: str) -> tuple[Weights, Path]:
        """Weights after a run on four ranks, and its checkpoint."""
        folder = self._folder / f"{method}-four"
        return self._pool.run(train, method, folder, ranks=4)[0], folder

    def check(self, method: str, weights: Weights, parts: tuple[int, ...]) -> None:
        """Compare with one process.

        Ranks sum the gradients of parts of a batch. Some methods amplify what that alone rounds
        (they divide by moments of entries that are nearly zero, or choose between nearly equal
        columns), so where the plain run is not met, the run of one process counts that sums the
        same parts, and, if need be, ten times what the order of its sums and an error of one
        rounding do to it. States in few bits jump from code to code, which takes a larger error to
        see in one try.
        """
        error = difference(weights, self._alone(method))
        if error < 1e-5:
            return
        expected = self._alone(method, parts)
        error = difference(weights, expected)
        if error < 1e-5:
            return
        recipe = lookup(method)
        jumps = 100.0 if recipe.compose(recipe.defaults).storage.low_bit else 1.0
        noisy = self._alone(method, parts, jumps * ROUNDING)
        assert error < 10.0 * difference(noisy, expected)


@pytest.fixture(scope="session")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pool, tmp_path_factory.mktemp("checkpoints"))


def test_four_ranks_equal_one_process(runs: Runs, method: str) -> None:
    runs.check(method, runs.four(method)[0], (4,) * STEPS)


def test_two_ranks_equal_one_process(runs: Runs, pool: Pool, method: str) -> None:
    runs.check(method, pool.run(train, method, ranks=2)[0], (2,) * STEPS)


def test_a_run_resumed_on_two_ranks_and_then_on_one_equals_one_process(
    runs: Runs, pool: Pool, method: str, tmp_path: Path
) -> None:
    _, first = runs.four(method)
    pool.run(resume, method, first, tmp_path / "two", ranks=2)
    runs.check(method, finish(method, tmp_path / "two"), FOUR_TWO_ONE)


@pytest.mark.parametrize("ranks", [3])
def test_pieces_of_given_gradients_give_the_weights_of_one_process(
    pool: Pool, method: str, ranks: int
) -> None:
    error, _ = pool.run(compare_on_given, method, ranks=ranks)[0]
    assert error < 2e-6
