"""DistributedDataParallel with coordinates on the wire."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from problem import Problem
from sharded_problem import STEPS, Weights, difference, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from worker_pool import Pool

from subspan.optim import for_model
from subspan.optim.ddp import project_gradients_in_ddp

REFUSED = "use DistributedDataParallel as it is"


def train(mesh: DeviceMesh, method: str, hooked: bool, parts: int = 1) -> Weights | str:
    """The problem under DDP; with several parts, gradients are summed without exchange before."""
    problem = Problem(method, share=(mesh.get_local_rank(), mesh.size()))
    wrapped = DistributedDataParallel(problem.model)
    if hooked:
        try:
            project_gradients_in_ddp(wrapped, problem.optimizer)
        except ValueError as error:
            return str(error)
    own = problem.model
    problem.model = wrapped  # type: ignore[assignment]
    for step in range(STEPS):
        problem.optimizer.zero_grad()
        for part in range(parts):
            with wrapped.no_sync() if part < parts - 1 else nullcontext():
                (problem.loss(parts * step + part) / parts).backward()
        problem.optimizer.step()
    problem.model = own
    return whole(problem)


def compare(mesh: DeviceMesh, method: str, parts: int = 1) -> float | str:
    """Difference from plain DDP, or why the method is refused."""
    weights = train(mesh, method, True, parts)
    if isinstance(weights, str):
        return weights
    return difference(weights, train(mesh, method, False, parts))


def test_the_hook_gives_the_weights_of_plain_ddp_or_refuses_the_method(
    pool: Pool, method: str
) -> None:
    found = pool.run(compare, method, ranks=2)
    for result in found:
        assert REFUSED in result if isinstance(result, str) else result < 1e-5


def test_methods_that_discard_the_residual_are_accepted_and_others_are_refused(
    pool: Pool,
) -> None:
    for method in ("galore", "galore2", "sara"):
        assert isinstance(pool.run(compare, method, ranks=2)[0], float)
    for method, why in {
        "fira": "NormScaled needs the whole gradient",
        "apollo": "RescaledGradient needs the whole gradient",
        "coap": "not orthonormal",
        "muon": "projects nothing",
        "ldadam": "needs the whole gradient",
        "q_galore": "few bits",
    }.items():
        assert why in pool.run(compare, method, ranks=2)[0]


def test_accumulated_gradients_are_exchanged_as_coordinates_too(pool: Pool) -> None:
    assert max(pool.run(compare, "galore", 3, ranks=2)) < 1e-5


SIDES, RANK = ((96, 64), (64, 64), (64, 128)), 8


class Chain(nn.Module):
    """Projected matrices alone, also one that is projected from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in SIDES)

    def forward(self, x: Tensor) -> Tensor:
        last, (first, second) = self.layers[2], (self.layers[0], self.layers[1])
        return first(second(last(x)))


def counted(mesh: DeviceMesh) -> list[tuple[int, int]]:
    """Bytes with the hook and without, for every step; refreshes are at 1 and 6."""
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(Chain())
    optimizer = for_model(wrapped.module, "galore", rank=RANK, update_proj_gap=5, project=".*")
    hook = project_gradients_in_ddp(wrapped, optimizer)
    steps = []
    for _ in range(7):
        before = hook.sent, hook.plain
        optimizer.zero_grad()
        wrapped(torch.randn(4, 128)).square().sum().backward()
        optimizer.step()
        steps.append((hook.sent - before[0], hook.plain - before[1]))
    return steps


def test_a_normal_step_sends_the_share_of_the_rank(pool: Pool) -> None:
    weights = sum(4 * m * n for m, n in SIDES)
    coordinates = sum(4 * RANK * max(m, n) for m, n in SIDES)
    for step, (sent, plain) in enumerate(pool.run(counted, ranks=2)[0], 1):
        assert plain == weights
        assert sent == (weights if step in (1, 6) else coordinates)
    smallest = min(min(m, n) for m, n in SIDES)
    assert coordinates <= (RANK / smallest + 0.02) * weights
