"""Replicas, what is refused, bad gradients, accumulation and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problem import Problem, same, snapshot
from sharded_problem import STEPS, Weights, difference, sharded, train_on_given, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from worker_pool import Pool

from subspan.layers import QuantisedWeight, quantise_linear
from subspan.optim import SGD, EnergyRank, GaLore

METHODS = ["adamw", "galore", "fira", "muon"]  # every way of updating, with and without sums


def replicas(mesh: DeviceMesh, method: str) -> Weights:
    """Two replicas of two pieces."""
    problem = sharded(method, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    problem.run(range(STEPS))
    return whole(problem)


@pytest.mark.parametrize("method", METHODS)
def test_two_replicas_of_two_pieces_equal_one_process(pool: Pool, method: str) -> None:
    problem = Problem(method)
    problem.run(range(STEPS))
    expected = whole(problem)
    for rank, weights in enumerate(pool.run(replicas, method, ranks=4)):
        assert difference(weights, expected) < 1e-5, rank


def copies(mesh: DeviceMesh) -> float:
    """Parameters that are DTensors and whole on every rank."""
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(8, 4))
    gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for parameter in (weight, plain):
        optimizer = GaLore([parameter], lr=0.1, rank=2)
        parameter.grad = gradient.clone()
        if parameter is weight:
            parameter.grad = distribute_tensor(gradient, mesh, [Replicate()])
        optimizer.step()
    return (weight.full_tensor() - plain).abs().max().item()


def test_replicated_parameters_are_updated_on_every_rank(pool: Pool) -> None:
    assert pool.run(copies, ranks=2) == [0.0, 0.0]


# ---------------------------------------------------------------------- refusals


def said(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusals(mesh: DeviceMesh) -> list[str]:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def two_cuts() -> None:
        weight = distribute_tensor(torch.ones(8, 4), both, [Shard(0), Shard(1)])
        GaLore([("block.0.q.weight", nn.Parameter(weight))])

    def two_meshes() -> None:
        lone = DTensor.from_local(torch.ones(4, 4), both["data"], [Shard(0)])
        other = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)])
        GaLore([("one", nn.Parameter(lone)), ("two", nn.Parameter(other))])

    def few_bits() -> None:
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        quantise_linear(model)
        held = model[0].weight
        assert isinstance(held, QuantisedWeight)
        weight = distribute_tensor(torch.ones(256, 64), mesh, [Shard(0)])
        weight._local_tensor = held.detach()  # `from_local` would make a float copy of it
        GaLore([("block.0.q.weight", weight.requires_grad_())])

    def ranks_by_energy() -> None:
        train_on_given(mesh, "galore", rank=EnergyRank(share=0.9))

    def in_backward() -> None:
        sharded("galore", mesh).optimizer.attach_to_backward()

    return [said(f) for f in (two_cuts, two_meshes, few_bits, ranks_by_energy, in_backward)]


def test_every_rank_refuses_what_cannot_be_sharded_with_its_reason(pool: Pool) -> None:
    expected = (
        ("ValueError", "'block.0.q.weight'", "sharded along one mesh dimension", "not two"),
        ("ValueError", "'two'", "an optimizer of its own"),
        ("ValueError", "'block.0.q.weight'", "held in int8", "shard float weights"),
        ("ValueError", "rank=EnergyRank", "give a number as rank"),
        ("ValueError", "parameters are sharded", "take ordinary steps"),
    )
    for messages in pool.run(refusals, ranks=4):
        for message, words in zip(messages, expected, strict=True):
            assert all(word in message for word in words), message


# ---------------------------------------------------------------------- bad gradients


def bad_piece(mesh: DeviceMesh, method: str, policy: str) -> tuple[str, bool, int]:
    """NaN in the last rank's piece of one gradient: what is said, and whether nothing changed."""
    problem = sharded(method, mesh, nonfinite=policy)
    problem.run(range(2))
    problem.backward(2)
    if mesh.get_local_rank() == mesh.size() - 1:
        gradient = problem.model.wide.weight.grad
        assert isinstance(gradient, DTensor)
        gradient.to_local()[0, 0] = torch.nan
    weights, state = whole(problem), snapshot(problem.optimizer)
    message = said(problem.optimizer.step)
    unchanged = difference(whole(problem), weights) == 0 and same(
        snapshot(problem.optimizer), state
    )
    skipped = problem.optimizer.skipped_steps
    problem.run([3])  # and all ranks can go on
    return message, unchanged, skipped


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_one_piece_is_an_error_on_every_rank_before_anything_changed(
    pool: Pool, method: str
) -> None:
    for message, unchanged, _ in pool.run(bad_piece, method, "raise", ranks=4):
        assert message.startswith("FloatingPointError") and "'wide.weight'" in message
        assert unchanged


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_one_piece_leaves_the_step_out_on_every_rank(pool: Pool, method: str) -> None:
    for message, unchanged, skipped in pool.run(bad_piece, method, "skip", ranks=4):
        assert message == "accepted" and unchanged and skipped == 1


def large_piece(mesh: DeviceMesh, policy: str) -> tuple[str, int]:
    """Finite gradients whose sum is not."""
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.full((8, 4), 3e38), mesh, [Shard(0)])
    optimizer = SGD([weight], lr=1e-39, momentum=0.0, nonfinite=policy)
    return said(optimizer.step), optimizer.skipped_steps


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_finite_gradients_whose_sum_overflows_are_accepted(pool: Pool, policy: str) -> None:
    for message, skipped in pool.run(large_piece, policy, ranks=2):
        assert message == "accepted" and skipped == 0


def unchecked(mesh: DeviceMesh) -> float:
    weights, _ = train_on_given(mesh, "galore", nonfinite="ignore")
    return difference(weights, train_on_given(None, "galore")[0])


def test_unchecked_gradients_need_no_agreement(pool: Pool) -> None:
    assert max(pool.run(unchecked, ranks=2)) < 2e-6


# ---------------------------------------------------------------------- the training loop


def accumulate_and_clip(problem: Problem, parts: int) -> tuple[Weights, list[float]]:
    """Twelve steps of two batches each, clipped by the norm of all gradients."""
    rank, ranks = problem.share
    norms = []
    for step in range(12):
        problem.optimizer.zero_grad()
        for half in range(2):
            for part in range(parts):
                problem.share = (part, parts) if ranks == 1 else (rank, ranks)
                (problem.loss(2 * step + half) / (2 * parts)).backward()
        norm: Any = nn.utils.clip_grad_norm_(problem.model.parameters(), 0.5)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norms.append(float(norm))
        problem.optimizer.step()
    return whole(problem), norms


def accumulated(mesh: DeviceMesh, method: str) -> tuple[Weights, list[float]]:
    return accumulate_and_clip(sharded(method, mesh), 1)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_and_clipping_equal_one_process(pool: Pool, method: str) -> None:
    weights, norms = pool.run(accumulated, method, ranks=2)[0]
    expected, own = accumulate_and_clip(Problem(method), 2)
    assert max(own) > 0.5  # something was clipped
    assert norms == pytest.approx(own, rel=1e-5)
    assert difference(weights, expected) < 1e-5


def rounded(mesh: DeviceMesh) -> tuple[list[str], Weights]:
    """Weights in float32 that are gathered and whose gradients are reduced in bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    problem = sharded("galore", mesh, {"mp_policy": policy})
    problem.run(range(STEPS))
    kinds = {
        str(t.dtype)
        for s in problem.optimizer.state.values()
        for t in s.values()
        if isinstance(t, Tensor)
    }
    return sorted(kinds), whole(problem)


def test_mixed_precision_trains_float32_weights_with_float32_states(pool: Pool) -> None:
    kinds, weights = pool.run(rounded, ranks=2)[0]
    problem = Problem("galore")
    problem.run(range(STEPS))
    assert kinds == ["torch.float32"]
    assert 1e-5 < difference(weights, whole(problem)) < 0.2
