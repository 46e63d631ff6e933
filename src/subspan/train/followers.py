"""What the processes of a run do that do not lead it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from subspan.train.callbacks import Metrics
from subspan.train.config import TrainConfig
from subspan.train.distributed import agreed, gathered, save_final


class Follower(Metrics):
    """Decides like `Metrics` when to log and whether training diverged, and writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull), 0, [], [])

    def on_save(self, *_: Any, **__: Any) -> None:
        """Nothing to flush."""


def follow(config: TrainConfig, until: int | None) -> None:
    """Take part in a run that rank 0 leads; the collectives are those of `job._train`."""
    from subspan.train.checkpoints import check_resumable
    from subspan.train.job import _check, _quiet_libraries, prepare
    from subspan.train.machine import peak_memory, reset_peak_memory
    from subspan.train.session import StopAt, make_trainer, state_bytes

    config = _check(config)
    _quiet_libraries()
    folder = Path(config.output)
    trainer = make_trainer(config, folder, prepare(config, Console(quiet=True)))
    last: Path | None = agreed(None)
    if last is not None:
        check_resumable(last, trainer.identity())
    trainer.add_callback(Follower())
    if until is not None:
        trainer.add_callback(StopAt(until))
    reset_peak_memory()
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    peak = peak_memory()
    if trainer.state.global_step < config.total_steps:
        return
    save_final(trainer, folder)
    gathered((state_bytes(trainer), peak))
