"""The recorder: right numbers, at the right steps, however weights are updated, and on resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspan.optim import build, methods, param_groups_for_model
from subspan.subspaces import Coordinates, Dense, Entries, TwoSided, captured_energy
from subspan.train.config import TrainConfig
from subspan.train.job import run_job
from subspan.train.metrics import Line, read_metrics
from subspan.train.progress import RunProgress
from subspan.train.recorder import SubspaceRecorder, effective_rank, measure, spacing

Settings = Callable[..., TrainConfig]


def basis(size: int, rank: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    columns = torch.randn(size, rank, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(columns)[0]


def matrix(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy_rank(coordinates: Tensor) -> float:
    values = torch.linalg.svdvals(coordinates)
    shares = [float(v / values.sum()) for v in values if v > 0]
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("orthonormal", [True, False])
def test_measures_are_those_of_the_projectors(side: Any, orthonormal: bool, seed: int) -> None:
    gradient, size = matrix(12, 9, seed), 12 if side == "left" else 9
    new, old = (basis(size, 3, 10 * seed + k) for k in (1, 2))
    # Any other columns of the same span describe the same subspace.
    mix = torch.eye(3).double() if orthonormal else matrix(3, 3, seed + 50)
    found = measure(gradient, Dense(side, new @ mix, orthonormal), Dense(side, old))
    onto, before = new @ new.T, old @ old.T
    inside = onto @ gradient if side == "left" else gradient @ onto
    expected = [
        float(torch.trace(onto @ before)) / 3,
        float(inside.square().sum() / gradient.square().sum()),
        entropy_rank(inside),
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_measures_of_two_sides_and_of_entries() -> None:
    gradient, left, right = matrix(8, 6, 0), basis(8, 2, 1), basis(6, 3, 2)
    overlap, energy, rank = measure(gradient, TwoSided(left, right), None).tolist()
    inside = left.T @ gradient @ right
    assert math.isnan(overlap)
    assert energy == pytest.approx(float(inside.square().sum() / gradient.square().sum()))
    assert rank == pytest.approx(entropy_rank(inside))
    chosen = Entries(torch.tensor([0, 7, 30]), (8, 6))
    overlap, energy, rank = measure(gradient, chosen, Entries(torch.tensor([7, 8, 9]), (8, 6)))
    picked = gradient.flatten()[[0, 7, 30]].square().sum() / gradient.square().sum()
    assert (float(overlap), float(energy)) == pytest.approx((1 / 3, float(picked)))
    assert math.isnan(rank)
    # Kinds that cannot be compared have no overlap.
    columns = Coordinates("left", torch.tensor([1, 2]), 8)
    assert math.isnan(measure(gradient, chosen, columns)[0])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_effective_rank_counts_equal_singular_values(count: int) -> None:
    x = basis(8, count, count) @ basis(9, count, count + 1).T
    assert float(effective_rank(1e-9 * x)) == pytest.approx(count, abs=1e-5)
    assert float(effective_rank(0 * x)) == 0


def test_spacing_bounds_the_number_of_recordings() -> None:
    assert [spacing(steps) for steps in (1, 300, 1000, 1001, 100_000)] == [10, 10, 10, 11, 1000]


class Job:
    """A small model, its gradients from a seed, and the Trainer's events around each step."""

    def __init__(
        self, method: str, backward: bool = False, steps: int = 42, passes: int = 1, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 6)])})
        groups = param_groups_for_model(self.model, project=[r"layers\.\d+\.weight"])
        self.optimizer: Any = build(method, groups, lr=0.01, **options)
        if backward:
            self.optimizer.attach_to_backward(accumulation_steps=passes)
        self.passes = passes
        self.draw = torch.Generator().manual_seed(1)
        self.state = SimpleNamespace(global_step=0, max_steps=steps)
        self.energies: dict[tuple[int, str], float] = {}

    def forward_and_backward(self) -> None:
        x = torch.randn(5, 12, generator=self.draw)
        for layer in self.model["layers"]:
            x = layer(x).tanh()
        x.square().sum().backward()

    def run(self, path: Path, **given: Any) -> list[Line]:
        recorder: Any = SubspaceRecorder(path, **given)
        events = {"args": None, "state": self.state, "control": None, "optimizer": self.optimizer}
        named = list(self.model.named_parameters())
        recorder.on_train_begin(**events)
        while self.state.global_step < self.state.max_steps:
            recorder.on_step_begin(**events)
            for _ in range(self.passes):
                self.forward_and_backward()
            recorder.on_pre_optimizer_step(**events)
            gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
            self.optimizer.step()
            recorder.on_optimizer_step(**events)
            for name, parameter in named:
                subspace = self.optimizer.subspace_of(parameter) if name in gradients else None
                if subspace is not None:
                    view = self.optimizer.layout_of(parameter).view
                    energy = captured_energy(gradients[name].reshape(view), subspace)
                    self.energies[self.state.global_step + 1, name] = float(energy.mean())
            self.optimizer.zero_grad()
            self.state.global_step += 1
        recorder.close()
        return read_metrics(path)


def test_recorded_numbers_are_those_of_the_refresh(tmp_path: Path) -> None:
    lines = Job("galore", rank=3, update_proj_gap=10).run(tmp_path / "s.jsonl")
    assert [line["step"] for line in lines] == [1, 1, 11, 11, 21, 21, 31, 31, 41, 41]
    assert [line["name"] for line in lines[:2]] == ["layers.0.weight", "layers.1.weight"]
    assert [line["shape"] for line in lines[:2]] == [[8, 12], [6, 8]]
    assert all(line["overlap"] is None for line in lines[:2])
    # The same run, with the basis and the gradient of each refresh taken from the optimizer.
    job = Job("galore", rank=3, update_proj_gap=10)
    weight = job.model["layers"][0].weight
    previous = None
    for line in lines[::2]:
        while job.state.global_step < line["step"]:
            previous = job.optimizer.subspace_of(weight)
            previous = None if previous is None else previous.dense().clone()
            job.forward_and_backward()
            gradient = weight.grad.clone()
            job.optimizer.step()
            job.optimizer.zero_grad()
            job.state.global_step += 1
        new = job.optimizer.subspace_of(weight).dense()
        inside = new.T @ gradient
        energy = float(inside.square().sum() / gradient.square().sum())
        assert line["energy"] == pytest.approx(energy, abs=1e-5)
        assert line["effective_rank"] == pytest.approx(entropy_rank(inside), abs=1e-3)
        if previous is not None:
            expected = float((previous.T @ new).square().sum()) / 3
            assert line["overlap"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_is_recorded_or_says_that_it_has_no_subspaces(
    tmp_path: Path, name: str
) -> None:
    path, told = tmp_path / "s.jsonl", []
    recipe = methods()[name]
    options = {"rank": 3} if "rank" in recipe.defaults else {}
    job = Job(name, steps=25, **options)
    lines = job.run(path, tell=told.append)
    assert path.exists() == (not told)
    if told:
        assert told == [f"{recipe.title} has no subspaces, so there is no s.jsonl"]
        return
    for line in lines:
        # Of the gradient before the step, which no method may have changed.
        energy = job.energies[line["step"], line["name"]]
        assert line["energy"] == pytest.approx(energy, abs=1e-5)
        assert line["overlap"] is None or 0 <= line["overlap"] <= 1
        assert line["effective_rank"] is None or 1 <= line["effective_rank"] <= max(line["shape"])


@pytest.mark.parametrize(
    "method", ["galore", "apollo", "online_subspace_descent", "ldadam", "frugal", "flora"]
)
def test_recording_changes_no_weight(tmp_path: Path, method: str) -> None:
    weights = []
    for record in (True, False):
        options = {"rank": 3} if "rank" in methods()[method].defaults else {}
        job = Job(method, steps=25, **options)
        if record:
            job.run(tmp_path / "s.jsonl")
        else:
            for _ in range(25):
                job.forward_and_backward()
                job.optimizer.step()
                job.optimizer.zero_grad()
        weights.append([p.detach().clone() for p in job.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("method", "passes"), [("galore", 1), ("fira", 1), ("apollo", 1), ("galore", 3)]
)
def test_updates_in_the_backward_pass_are_recorded_alike(
    tmp_path: Path, method: str, passes: int
) -> None:
    options: dict[str, Any] = {"rank": 3, "update_proj_gap": 10, "passes": passes}
    usual = Job(method, **options).run(tmp_path / "a.jsonl")
    inside = Job(method, backward=True, **options).run(tmp_path / "b.jsonl")
    usual, inside = (
        sorted(x, key=lambda line: (line["step"], line["name"])) for x in (usual, inside)
    )
    assert [line["step"] for line in inside] == [line["step"] for line in usual]
    for one, other in zip(usual, inside, strict=True):
        assert one["name"] == other["name"]
        for key in ("overlap", "energy", "effective_rank"):
            if one[key] is None:
                assert other[key] is None
            else:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key


def test_means_over_layers_go_to_the_listeners(tmp_path: Path) -> None:
    means: list[Line] = []
    lines = Job("galore", rank=3, update_proj_gap=20).run(
        tmp_path / "s.jsonl", listeners=[means.append]
    )
    assert [line["step"] for line in means] == [1, 21, 41]
    assert "overlap" not in means[0]
    pair = [line for line in lines if line["step"] == 21]
    for key in ("overlap", "energy", "effective_rank"):
        assert means[1][key] == pytest.approx(sum(line[key] for line in pair) / 2, abs=1e-5)


def test_resumed_run_records_the_same_lines(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"record_subspaces": True, "steps": 24, "checkpoint_every": 9}
    whole, cut = (settings(output=str(tmp_path / name), **common) for name in ("whole", "cut"))
    run_job(whole)
    real = RunProgress.step

    def step(self: RunProgress, number: int) -> None:
        real(self, number)
        if number == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run_job(cut)
    run_job(cut)
    lines = [read_metrics(Path(run.output) / "subspaces.jsonl") for run in (whole, cut)]
    assert lines[0] == lines[1]
    assert sorted({line["step"] for line in lines[0]}) == [1, 11, 21]
    assert len(lines[0]) == 3 * 14  # Seven matrices in each of two blocks.


def test_method_without_subspaces_leaves_one_line_and_no_file(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    config = settings(
        method="adamw", rank=None, update_proj_gap=None, record_subspaces=True, steps=2
    )
    run_job(config, Console(width=200))
    assert capsys.readouterr().out.count("AdamW has no subspaces, so there is no") == 1
    assert not (Path(config.output) / "subspaces.jsonl").exists()
