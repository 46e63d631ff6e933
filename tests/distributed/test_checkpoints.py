"""Checkpoints: PyTorch's own functions, refusals, and folders that are complete or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from problem import Problem
from sharded_problem import Weights, difference, sharded, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from worker_pool import Pool

from subspan.optim.sharded_checkpoint import load_sharded, save_sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def train_and_save(mesh: DeviceMesh, method: str, folder: Path) -> Weights:
    problem = sharded(method, mesh)
    problem.run(range(6))
    model, optimizer = get_state_dict(problem.model, problem.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    problem.run(range(6, 12))
    return whole(problem)


def load_and_train(mesh: DeviceMesh, method: str, folder: Path) -> Weights:
    problem = sharded(method, mesh)
    model, optimizer = get_state_dict(problem.model, problem.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        problem.model,
        problem.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    problem.run(range(6, 12))
    return whole(problem)


@pytest.mark.parametrize("method", ["galore", "muon"])
def test_torch_state_dict_functions_resume_a_run_on_fewer_ranks(
    pool: Pool, method: str, tmp_path: Path
) -> None:
    expected = pool.run(train_and_save, method, tmp_path / "torch", ranks=4)[0]
    resumed = pool.run(load_and_train, method, tmp_path / "torch", ranks=2)[0]
    assert difference(resumed, expected) < 1e-5


def messages(mesh: DeviceMesh, folder: Path) -> list[str]:
    """What is said to wrong folders and methods, and whether anything changed then."""
    problem = sharded("galore", mesh)
    problem.run(range(2))
    save_sharded(folder, problem.model, problem.optimizer)
    other, smaller = sharded("muon", mesh), sharded("galore", mesh, rank=2)
    before, said = whole(other), []
    for call, arguments in (
        (save_sharded, (folder, problem.model, problem.optimizer)),
        (load_sharded, (folder.with_name("none"), problem.model, problem.optimizer)),
        (load_sharded, (folder, other.model, other.optimizer)),
        (load_sharded, (folder, smaller.model, smaller.optimizer)),
    ):
        try:
            call(*arguments)
        except (OSError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    assert difference(whole(other), before) == difference(whole(smaller), before) == 0
    return said


def test_every_rank_refuses_a_folder_that_exists_is_missing_or_does_not_fit(
    pool: Pool, tmp_path: Path
) -> None:
    for exists, missing, other, smaller in pool.run(messages, tmp_path / "one", ranks=2):
        assert exists.startswith("FileExistsError") and "choose another folder" in exists
        assert missing.startswith("FileNotFoundError") and "no complete checkpoint" in missing
        assert other.startswith("ValueError") and "'galore'" in other and "'muon'" in other
        assert smaller.startswith("ValueError") and "rank from 2 to 4" in smaller


def save_and_die(folder: Path) -> None:
    """Die when all is written, just before the folder gets its name."""
    problem = Problem("galore")
    problem.run(range(1))
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if Path(target) == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = killed  # type: ignore[method-assign]
    save_sharded(folder, problem.model, problem.optimizer)


def test_a_save_that_is_killed_before_its_end_leaves_nothing_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    process = multiprocessing.get_context("spawn").Process(target=save_and_die, args=(folder,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial != folder
    assert (partial / ".metadata").is_file()
    problem = Problem("galore")
    problem.run(range(1))
    for name in (folder, partial):
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            load_sharded(name, problem.model, problem.optimizer)
    save_sharded(folder, problem.model, problem.optimizer)
    load_sharded(folder, problem.model, problem.optimizer)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_checkpoint_of_another_model_is_refused_before_anything_changed(tmp_path: Path) -> None:
    first, second = Problem("galore"), Problem("galore", seed=1)
    first.run(range(2))
    save_sharded(tmp_path / "one", first.model, first.optimizer)
    second.model.wide = torch.nn.Linear(24, 41)
    before = second.weights()
    with pytest.raises(ValueError, match=r"'wide\.bias' has shape \(40,\) in checkpoint"):
        load_sharded(tmp_path / "one", second.model, second.optimizer)
    pairs = zip(second.weights(), before, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and not second.optimizer.state


def test_a_checkpoint_holds_the_extra_numbers_and_loads_bit_for_bit(tmp_path: Path) -> None:
    first, second = Problem("fira"), Problem("fira", seed=1)
    first.run(range(6))
    extra: dict[str, Any] = {"step": 6, "schedule": [0.1, 0.2], "name": "a"}
    save_sharded(tmp_path / "one", first.model, first.optimizer, extra)
    assert load_sharded(tmp_path / "one", second.model, second.optimizer) == extra
    for problem in (first, second):
        problem.run(range(6, 9))
    pairs = zip(first.weights(), second.weights(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
