"""Online Subspace Descent against the trajectories of its released code, and against the paper's
loss written out and differentiated automatically."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording import follow, load, recorded_bases
from torch import Tensor

import subspan.optim as optim
from subspan.subspaces.finders import Replay

# The official projection's learning rate is the reciprocal of the recordings' update_proj_gap.
SHARED = {"rank": 8, "lr": 1e-2, "update_proj_gap": 10}
CASES: dict[str, dict[str, Any]] = {
    "osd_adamw_p_adamw": {"projection_optimizer": "adamw"},
    "osd_adamw_p_sgd": {"projection_optimizer": "sgd"},
    "osd_adamw_p_lion": {"projection_optimizer": "lion"},
    "osd_adamw_p_adafactor": {"projection_optimizer": "adafactor"},
    "osd_adamw_random": {"projection_optimizer": "random"},
    "osd_lion_p_adamw": {"inner": "lion", "betas": (0.9, 0.99), "lr": 1e-3},
}


def run(name: str, **limits: Any) -> None:
    recording, _ = load(name)
    options = SHARED | CASES[name]
    if name == "osd_adamw_random":
        options["finder"] = Replay(recorded_bases(recording))

    def build(weights: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return optim.build("online_subspace_descent", list(weights.items()), **options)

    follow(build, recording, **limits)


@pytest.mark.parametrize("name", ["osd_adamw_p_adamw", "osd_adamw_p_sgd", "osd_adamw_random"])
def test_equals_the_official_trajectory(name: str) -> None:
    """Signs of the first basis, which its own SVD leaves open, do not matter."""
    run(name, tolerance=3e-5)


def test_lion_on_the_projection_equals_the_official_trajectory() -> None:
    """An entry whose sign is lost in rounding moves a whole row: "square" has one after step 20."""
    run("osd_adamw_p_lion", tolerance=1e-6, parameters=("bias", "wide", "tall"))
    run("osd_adamw_p_lion", tolerance=1e-6, parameters=("square",), until=20)


def test_adafactor_on_the_projection_equals_the_official_trajectory_while_rounding_is_small() -> (
    None
):
    """A relative change of the gradients by 1e-8 has grown a millionfold by step 40."""
    run("osd_adamw_p_adafactor", tolerance=1e-4, until=11)


def test_lion_on_the_weights_equals_the_official_trajectory_but_for_single_signs() -> None:
    run("osd_lion_p_adamw", tolerance=1e-7, outliers=3 / 3840)


def adafactor_step(basis: Tensor, slope: Tensor, memory: dict[str, Any], lr: float) -> Tensor:
    memory["step"] = memory.get("step", 0) + 1
    rate = 1.0 - memory["step"] ** -0.8
    squares = slope**2 + 1e-30
    rows = rate * memory.get("rows", 0.0) + (1 - rate) * squares.mean(1)
    columns = rate * memory.get("columns", 0.0) + (1 - rate) * squares.mean(0)
    memory.update(rows=rows, columns=columns)
    value = slope / torch.outer(rows, columns).div(rows.mean()).sqrt()
    value = value / max(1.0, value.pow(2).mean().sqrt().item())
    return basis - lr * value


def lion_step(basis: Tensor, slope: Tensor, memory: dict[str, Any], lr: float) -> Tensor:
    moment = memory.get("moment", torch.zeros_like(slope))
    memory["moment"] = 0.99 * moment + 0.01 * slope
    return basis - lr * torch.sign(0.9 * moment + 0.1 * slope)


def torch_step(kind: Callable[..., torch.optim.Optimizer]) -> Callable[..., Tensor]:
    def step(basis: Tensor, slope: Tensor, memory: dict[str, Any], lr: float) -> Tensor:
        if "optimizer" not in memory:
            memory["basis"] = torch.nn.Parameter(basis.clone())
            memory["optimizer"] = kind([memory["basis"]], lr=lr)
        memory["basis"].grad = slope
        memory["optimizer"].param_groups[0]["lr"] = lr
        memory["optimizer"].step()
        return memory["basis"].detach().clone()

    return step


RULES = {
    "adamw": torch_step(torch.optim.AdamW),
    "sgd": torch_step(torch.optim.SGD),
    "lion": lion_step,
    "adafactor": adafactor_step,
}


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_equals_the_published_formulas_in_float64(
    kind: str, shape: tuple[int, int], penalty: float
) -> None:
    """P is compared after every step, with a learning rate that halves at step 6."""
    draw = torch.Generator().manual_seed(3)
    wide = shape[0] < shape[1]
    weight = torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
    expected = weight.detach().clone() if wide else weight.detach().T.clone()
    optimizer = optim.build(
        "online_subspace_descent",
        [weight],
        lr=0.02,
        rank=3,
        projection_lr=0.05,
        projection_optimizer=kind,
        penalty=penalty,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5], 0.5)
    basis = moments = None
    memory: dict[str, Any] = {}
    for step in range(1, 13):
        lr = 0.02 if step < 6 else 0.01
        weight.grad = torch.randn(shape, generator=draw, dtype=torch.float64)
        gradient = weight.grad if wide else weight.grad.T
        optimizer.step()
        schedule.step()
        if basis is None:
            basis = torch.linalg.svd(gradient)[0][:, :3]
            # The signs of singular vectors are free.
            ours = optimizer.state[weight]["basis"]
            basis = basis * (basis * ours).sum(0).sign()
            moments = [torch.zeros(3, gradient.shape[1], dtype=torch.float64) for _ in range(2)]
            moved = basis
        else:
            moving = basis.clone().requires_grad_()
            unit = gradient / gradient.norm()
            loss = (moving @ moving.T @ unit - unit).norm() ** 2
            loss = loss + penalty * (moving.T @ moving - torch.eye(3)).norm() ** 2
            (slope,) = torch.autograd.grad(loss, moving)
            moved = RULES[kind](basis, slope, memory, 0.05 * lr / 0.02)
        assert moments is not None
        inside = basis.T @ gradient
        moments[0] = 0.9 * moments[0] + 0.1 * inside
        moments[1] = 0.999 * moments[1] + 0.001 * inside**2
        size = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        expected -= size * 0.25 * basis @ (moments[0] / (moments[1].sqrt() + 1e-6))
        basis = moved
        torch.testing.assert_close(optimizer.state[weight]["basis"], basis, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        weight.detach() if wide else weight.detach().T, expected, rtol=1e-8, atol=1e-9
    )


def test_without_a_learning_rate_of_its_own_the_first_subspace_stays_in_force() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(12, 9, generator=draw)
    gradients = torch.randn(8, 12, 9, generator=draw)
    moved = []
    for method, options in (
        ("online_subspace_descent", {"projection_lr": 0.0}),
        ("galore", {"update_proj_gap": 1000, "finder": "svd"}),
    ):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optim.build(method, [weight], rank=4, lr=0.01, scale=0.25, **options)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-7)
