"""Trackers: the same numbers everywhere, also when a run goes on; tested with fake services."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.job import run_job
from subspan.train.metrics import read_metrics
from subspan.train.overrides import fields
from subspan.train.progress import RunProgress
from subspan.train.tracking import check_trackers, numbers, open_trackers

Settings = Callable[..., TrainConfig]
Sent = list[tuple[int, dict[str, float]]]

LINES = [
    {"step": 3, "tokens": 30, "seconds": 0.5, "loss": 5.0, "lr": 0.01, "grad_norm": 1.5},
    {"step": 3, "tokens": 30, "seconds": 0.5, "validation_loss": 5.5, "perplexity": 244.7},
    {"step": 4, "overlap": 0.5, "energy": 0.9, "effective_rank": 3.5},
]
NUMBERS = [
    {
        "train/loss": 5.0,
        "train/lr": 0.01,
        "train/grad_norm": 1.5,
        "progress/tokens": 30,
        "progress/seconds": 0.5,
    },
    {
        "validation/loss": 5.5,
        "validation/perplexity": 244.7,
        "progress/tokens": 30,
        "progress/seconds": 0.5,
    },
    {"subspace/overlap": 0.5, "subspace/energy": 0.9, "subspace/effective_rank": 3.5},
]


class FakeService(ModuleType):
    """A package with the functions that wandb and trackio share."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sessions: list[dict[str, Any]] = []
        self.sent: Sent = []
        self.open = False

    def init(self, **given: Any) -> None:
        self.sessions.append(given)
        self.open = True

    def log(self, values: dict[str, float], step: int) -> None:
        assert self.open
        self.sent.append((step, values))

    def finish(self) -> None:
        self.open = False


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    fake = FakeService(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    monkeypatch.delenv(f"{request.param.upper()}_PROJECT", raising=False)
    return fake


def scalars(folder: Path) -> Sent:
    """What TensorBoard would show, as the services get it: one mapping for each step and group."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: Sent = []
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.append((event.step, {tag: pytest.approx(event.value, rel=1e-6)}))
    return found


def single(sent: Sent) -> Sent:
    return [(step, {name: value}) for step, values in sent for name, value in values.items()]


def test_numbers_have_the_same_names_everywhere() -> None:
    assert [numbers(line) for line in LINES] == NUMBERS


def test_service_gets_exactly_the_numbers_of_the_lines(
    service: FakeService, tmp_path: Path
) -> None:
    (tracker,) = open_trackers([service.__name__], tmp_path / "run", {"lr": 0.01})  # type: ignore[list-item]
    for line in LINES:
        tracker.add(line)
    tracker.close()
    assert service.sent == [
        (line["step"], values) for line, values in zip(LINES, NUMBERS, strict=True)
    ]
    (session,) = service.sessions
    assert session["config"] == {"lr": 0.01}
    assert session["project"] == "subspan"
    assert not service.open


def test_tensorboard_gets_the_same_numbers_as_the_service(
    service: FakeService, settings: Settings
) -> None:
    track = ["tensorboard", service.__name__]
    config = settings(track=track, record_subspaces=True)
    run_job(config)
    folder = Path(config.output)
    expected = single(service.sent)
    shown = scalars(folder / "tensorboard")
    assert len(shown) == len(expected) > 30
    for step, values in shown:
        assert (step, values) in expected
    # And those are the numbers of the run folder.
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [(line["step"], numbers(line)) for line in lines]
    assert [item for item in service.sent if "subspace/energy" not in item[1]] == steps


def test_resumed_run_sends_every_number_once_and_under_one_identity(
    service: FakeService, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(track=[service.__name__], record_subspaces=True)
    real = RunProgress.step

    def step(self: RunProgress, number: int) -> None:
        real(self, number)
        if number == 11:  # The checkpoint is of step 8; the metrics have a line of step 9.
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run_job(config)
    assert not service.open
    run_job(config)
    lines = read_metrics(Path(config.output) / "metrics.jsonl")
    losses = [(step, v["train/loss"]) for step, v in service.sent if "train/loss" in v]
    assert losses == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    recorded = [step for step, values in service.sent if "subspace/energy" in values]
    assert recorded == [1, 11]
    one, two = service.sessions
    assert one == two
    assert one["resume"] == "allow"


def test_service_that_refuses_is_one_line(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(service, "init", refuse)
    name: Any = service.__name__
    with pytest.raises(JobError, match=f"^track={name}: no API key configured$"):
        open_trackers(["tensorboard", name], tmp_path, {})


def test_missing_package_is_refused_before_anything_is_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(JobError, match=r"^track=wandb: package wandb is not installed"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("text", "names"),
    [("wandb", ["wandb"]), ("tensorboard, trackio", ["tensorboard", "trackio"]), ("none", [])],
)
def test_flag_names_trackers_or_none(text: str, names: list[str]) -> None:
    assert fields({"track": text}) == {"track": names}
