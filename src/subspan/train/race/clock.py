"""Wall clock of the arms after the race, measured so that the machine's moods hit all alike.

Runs of a race share a machine with each other and with whatever else there is, so their seconds
say little. Here the arms take turns, one optimizer step each per round, in one process on the same
batches, and medians are compared. Where they do not fit into memory together, processes of one arm
each take turns with a few steps. Steps that compute new bases count like any other: a gap longer
than the rounds has none of them, and the race's tokens per second say what they cost.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspan.train.config import TrainConfig, parse
from subspan.train.errors import JobError
from subspan.train.files import write_json
from subspan.train.race.process import MEMORY, Task, explained, read_order
from subspan.train.race.results import ClockArm, ClockRow

if TYPE_CHECKING:
    from subspan.train.race.execute import Pool

Times = dict[str, list[tuple[float, float | None]]]
"""Arm -> seconds of each step, and of the optimizer's part of it."""

_WARM_UP = 2  # steps after which states, caches and threads are settled
_TURNS = 3
_RATE = 1e-3  # share of the learning rate, without a warm-up that would make the peak safe
_ROOM = 0.8  # share of the free memory that one process may take


def measure(
    arms: Mapping[str, TrainConfig],
    rounds: int,
    processes: str,
    needed: int,
    folder: Path,
    pool: Pool[str],
) -> ClockRow:
    """Time the arms in processes of a pool.

    Args:
        arms: configuration of each.
        rounds: timed steps of each.
        processes: `one`, `turns` or `auto`.
        needed: bytes that the arms take together.
        folder: for files of the measurement, which are removed.
        pool: where it runs.

    Raises:
        JobError: a process failed; with the reason.
    """
    if processes == "one" or (processes == "auto" and needed < _ROOM * _free_memory()):
        try:
            found, machine = _process(arms, rounds, folder, pool)
            return summary(found, rounds, machine)
        except JobError as error:
            killed = MEMORY in str(error) or "want of memory" in str(error)
            if processes == "one" or not killed:
                raise
    times: Times = defaultdict(list)
    each = -(-rounds // _TURNS)
    for _ in range(_TURNS):
        for name, config in arms.items():
            found, machine = _process({name: config}, each, folder, pool)
            times[name] += found[name]
    return summary(times, each * _TURNS, machine)


def _free_memory() -> float:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1])
    return float("inf")


def _process(
    arms: Mapping[str, TrainConfig], rounds: int, folder: Path, pool: Pool[str]
) -> tuple[Times, dict[str, Any]]:
    file = folder / ".clock.json"
    order = {
        "arms": {name: config.model_dump(mode="json") for name, config in arms.items()},
        "rounds": rounds,
        "results": str(file),
    }
    errors = str(folder / "clock-errors.txt")
    pool.start("clock", Task(order, None, errors, module="subspan.train.race.clock"))
    ended = pool.wait(1.0)
    while not ended:
        ended = pool.wait(1.0)
    reason = ended[0][1]
    if reason is not None:
        raise JobError(f"the arms could not be timed: {reason}")
    found = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found["times"], found["machine"]


def summary(times: Times, rounds: int, machine: dict[str, Any]) -> ClockRow:
    """Medians and quartiles."""
    arms = {}
    for name, steps in times.items():
        seconds = [whole for whole, _ in steps]
        own = [part for _, part in steps if part is not None]
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        arms[name] = ClockArm(
            step_seconds=middle,
            low=low,
            high=high,
            mean_seconds=statistics.fmean(seconds),
            optimizer_seconds=statistics.median(own) if own else None,
        )
    return ClockRow(rounds=rounds, arms=arms, machine=machine)


class Stepper:
    """Model and optimizer of one arm, built as a run builds them."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import torch
        from rich.console import Console

        from subspan.train.job import prepare
        from subspan.train.session import make_trainer

        inputs = prepare(config, Console(quiet=True))
        trainer = make_trainer(config, folder, inputs)
        self._optimizer: Any = trainer.create_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] *= _RATE
        self._config, self._trainer, self._data = config, trainer, inputs.train
        self._model: Any = torch.compile(trainer.model) if config.compile else trainer.model
        self._cuda = trainer.args.device.type == "cuda"

    def step(self, number: int) -> tuple[float, float | None]:
        """One optimizer step on batch `number`; seconds in all and in the optimizer."""
        batches = self._batches(number)
        self._model.train()
        started = self._now()
        for batch in batches:
            with self._trainer.compute_loss_context_manager():
                loss = self._model(input_ids=batch, labels=batch).loss / len(batches)
            loss.backward()
        limit = self._trainer.args.max_grad_norm
        if limit:
            self._trainer.accelerator.clip_grad_norm_(self._model.parameters(), limit)
        before = self._now()
        self._optimizer.step()
        after = self._now()
        self._optimizer.zero_grad()
        own = None if self._config.update_in_backward else after - before
        return self._now() - started, own

    def _batches(self, number: int) -> list[Any]:
        import torch

        size, count = self._config.batch_size, self._config.accumulation
        first = number * size * count
        rows = [self._data[(first + i) % len(self._data)]["input_ids"] for i in range(size * count)]
        return list(torch.stack(rows).to(self._trainer.args.device).split(size))

    def _now(self) -> float:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def take_turns(arms: Mapping[str, TrainConfig], rounds: int, folder: Path) -> Times:
    """Step all arms in turn; the first of a round changes from round to round."""
    steppers = {name: Stepper(config, folder / name) for name, config in arms.items()}
    names = list(steppers)
    times: Times = {name: [] for name in names}
    for number in range(_WARM_UP + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = steppers[name].step(number)
            if number >= _WARM_UP:
                times[name].append(seconds)
    return times


def main() -> None:
    """Time the arms that standard input names and write the seconds into the file it names."""
    import tempfile

    from subspan.train.machine import describe

    order = read_order()["config"]
    arms = {n: parse(TrainConfig, values, f"arm {n}") for n, values in order["arms"].items()}
    with explained(), tempfile.TemporaryDirectory() as folder:
        times = take_turns(arms, order["rounds"], Path(folder))
    write_json(Path(order["results"]), {"times": times, "machine": describe()["machine"]})


if __name__ == "__main__":
    main()
