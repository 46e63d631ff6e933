"""What writes the numbers of a run: metrics as JSON lines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.train.errors import JobError
from subspan.train.metrics import Line, perplexity


class Metrics(TrainerCallback):
    """Writes one JSON line for each logging step and each evaluation.

    Training lines hold step, tokens, seconds, loss, lr (of the projected matrices) and grad_norm
    (before clipping); evaluation lines step, tokens, seconds, validation_loss and perplexity.
    `seconds` is time in optimizer steps, forward and backward included, without evaluation and
    saving, summed over the sessions of an interrupted run.

    Args:
        path: metrics file; lines after the checkpoint must have been dropped (`keep_metrics`).
        tokens_per_step: tokens of one optimizer step.
        previous: the lines that are kept.
        listeners: called with every new line.
    """

    def __init__(
        self,
        path: Path,
        tokens_per_step: int,
        previous: list[Line],
        listeners: Sequence[Callable[[Line], Any]],
    ) -> None:
        last = previous[-1] if previous else {}
        self.seconds: float = last.get("seconds", 0.0)
        self.optimizer_seconds: float = last.get("optimizer_seconds", 0.0)
        self.tokens_per_step = tokens_per_step
        self._listeners = listeners
        self._started = self._optimizer_started = 0.0
        self._file = path.open("a", encoding="utf-8")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._optimizer_started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer_seconds += time.perf_counter() - self._optimizer_started

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._started
        # The Trainer averages the loss since the last log and forgets it at a resume. A log at
        # every checkpoint makes the lines of a resumed run equal to an uninterrupted one's.
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            line = {"loss": logs["loss"], "lr": logs["learning_rate"]}
            self._check(logs["loss"], "loss", state.global_step)
            self._check(logs["grad_norm"], "gradient norm", state.global_step)
            self._write(state, line | {"grad_norm": logs["grad_norm"]})
        elif "eval_loss" in logs:
            loss = logs["eval_loss"]
            self._check(loss, "validation loss", state.global_step)
            self._write(state, {"validation_loss": loss, "perplexity": perplexity(loss)})

    def on_save(self, *_: Any, **__: Any) -> None:
        # A checkpoint must not outlive the lines before it.
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the metrics file."""
        self._file.close()

    @staticmethod
    def _check(value: float, name: str, step: int) -> None:
        if not math.isfinite(value):
            raise JobError(
                f"training diverged: {name} is {value} at step {step}; lower lr or plain_lr"
            )

    def _write(self, state: TrainerState, values: Line) -> None:
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(self.seconds, 4),
            "optimizer_seconds": round(self.optimizer_seconds, 4),
        } | values
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for listener in self._listeners:
            listener(line)
