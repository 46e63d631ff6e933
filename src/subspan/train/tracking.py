"""Where the numbers of a run go besides its folder: TensorBoard, Weights & Biases, trackio.

All three get the same numbers under the same names, at the optimizer step as their step. The
services are imported only when a run asks for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from subspan.train.errors import JobError, one_line
from subspan.train.files import write_json
from subspan.train.metrics import Line

TrackerName = Literal["tensorboard", "wandb", "trackio"]

_IDENTITY = "tracking.json"
_PROJECT = "subspan"
_NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "validation_loss": "validation/loss",
    "perplexity": "validation/perplexity",
    "tokens": "progress/tokens",
    "seconds": "progress/seconds",
    "overlap": "subspace/overlap",
    "energy": "subspace/energy",
    "effective_rank": "subspace/effective_rank",
}


def numbers(line: Line) -> dict[str, float]:
    """What a tracker gets of a line of metrics.jsonl, or of the recorder's means."""
    return {name: line[key] for key, name in _NAMES.items() if key in line}


class Tracker(Protocol):
    """A place for the numbers of one run."""

    def add(self, line: Line) -> None:
        """Add the `numbers` of one line at its step."""

    def close(self) -> None:
        """Send what is buffered and end the session."""


class TensorBoard:
    """Event files in `folder`; what lies after `first_step` is hidden when a run goes on there."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def add(self, line: Line) -> None:
        """See `Tracker.add`."""
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class Service:
    """Weights & Biases, or trackio, which has the same three functions.

    A resumed run goes on under its old identity. Steps that it repeats have been sent before and
    are left out.

    Args:
        name: of the package.
        folder: run folder; its name is the run's.
        config: what is shown as the run's configuration.
        sent: the lines that earlier sessions wrote, those after the checkpoint included.

    Raises:
        JobError: the service refuses the run, for example for want of a login.
    """

    def __init__(
        self, name: TrackerName, folder: Path, config: dict[str, Any], sent: Iterable[Line] = ()
    ) -> None:
        self._package = importlib.import_module(name)
        self._sent = {_key(line) for line in sent}
        identity = _identity(folder)
        place: dict[str, Any] = {"name": folder.name, "id": identity, "dir": str(folder)}
        if name == "trackio":  # It knows a run by its name alone.
            place = {"name": f"{folder.name}-{identity}"}
        project = os.environ.get(f"{name.upper()}_PROJECT", _PROJECT)
        try:
            self._package.init(project=project, config=config, resume="allow", **place)
        except Exception as error:
            raise JobError(f"track={name}: {one_line(error)}") from error

    def add(self, line: Line) -> None:
        """See `Tracker.add`."""
        if _key(line) not in self._sent:
            self._package.log(numbers(line), step=line["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        self._package.finish()


def _key(line: Line) -> tuple[int, bool, bool]:
    """What tells the lines of one run apart: the step, and whether it is of training, of validation
    or (neither) of the recorder."""
    return line["step"], "loss" in line, "validation_loss" in line


def _identity(folder: Path) -> str:
    """A random name that stays with the run folder."""
    path = folder / _IDENTITY
    if not path.is_file():
        write_json(path, {"id": secrets.token_hex(4)})
    identity: str = json.loads(path.read_text(encoding="utf-8"))["id"]
    return identity


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed, before anything is loaded.

    Raises:
        JobError: naming the package.
    """
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise JobError(f"track={name}: package {name} is not installed; pip install {name}")


def open_trackers(
    names: Sequence[TrackerName],
    folder: Path,
    config: dict[str, Any],
    first_step: int = 0,
    sent: Sequence[Line] = (),
) -> list[Tracker]:
    """The trackers that a run asks for.

    Args:
        names: which, in any order.
        folder: run folder.
        config: shown as the run's configuration.
        first_step: steps that are done.
        sent: see `Service`.

    Raises:
        JobError: see `Service`; those that were opened are closed again.
    """
    opened: list[Tracker] = []
    try:
        for name in dict.fromkeys(names):
            if name == "tensorboard":
                opened.append(TensorBoard(folder / name, first_step))
            else:
                opened.append(Service(name, folder, config, sent))
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened
