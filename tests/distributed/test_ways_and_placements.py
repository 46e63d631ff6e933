"""In which way every kind of parameter is updated, and what `shard_placement` cuts."""

from __future__ import annotations

import pytest
import torch
from problem import GAP, Problem
from sharded_problem import (
    STEPS,
    Weights,
    compare_on_given,
    difference,
    sharded,
    train_on_given,
    whole,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from worker_pool import Pool

from subspan.optim import SGD, shard_placement

# Methods whose projected matrices are updated in pieces.
IN_SLICES = [
    "apollo",
    "coap",
    "dct_adamw",
    "fira",
    "galore",
    "grassjump",
    "sara",
    "subspace_momentum",
    "subset_norm",
    "subset_norm_subspace_momentum",
    "subtrack_pp",
]


@pytest.mark.parametrize("method", IN_SLICES)
def test_matrices_cut_along_their_unprojected_side_are_updated_in_pieces(
    pool: Pool, method: str
) -> None:
    _, ways = pool.run(compare_on_given, method, ranks=2)[0]
    assert ways["block.0.q.weight"] == "slices"  # 24 x 12, cut along the rows
    assert ways["block.0.down.weight"] == "whole"  # 12 x 20, projected from the left
    assert ways["embed.weight"] == ways["block.0.norm.weight"] == "entries"


@pytest.mark.parametrize("method", IN_SLICES)
def test_matrices_cut_along_columns_are_updated_in_pieces_when_projected_from_the_left(
    pool: Pool, method: str
) -> None:
    error, ways = pool.run(compare_on_given, method, 1, ranks=3)[0]
    assert error < 2e-6
    assert ways["block.0.q.weight"] == "whole" and ways["block.0.down.weight"] == "slices"


def test_methods_that_mix_all_entries_of_a_matrix_gather_it(pool: Pool) -> None:
    for method in ("muon", "fismo"):
        error, ways = pool.run(compare_on_given, method, ranks=2)[0]
        assert error < 2e-6 and ways["block.0.q.weight"] == "whole"


def test_parts_that_need_a_whole_matrix_turn_pieces_into_gathered_matrices(pool: Pool) -> None:
    for options in ({"storage": "int8"}, {"refresh": "drift"}, {"refresh": "lazy"}):
        _, ways = pool.run(ways_with, options, ranks=2)[0]
        assert ways == "whole"


def ways_with(mesh: DeviceMesh, options: dict[str, object]) -> tuple[float, str]:
    error, ways = compare_on_given(mesh, "galore", **options)
    assert error < 2e-6
    return error, ways["block.0.q.weight"]


def test_placement_cuts_columns_of_what_is_projected_from_the_left() -> None:
    place = shard_placement("galore", ranks=4, rank=4)
    assert place(torch.empty(12, 20)) == Shard(1)
    assert place(torch.empty(20, 12)) is None
    assert place(torch.empty(12, 12)) is None  # GaLore projects squares from the right
    assert place(torch.empty(12, 21)) is None  # FSDP2 cuts columns evenly or not at all
    assert place(torch.empty(20)) is None
    assert place(torch.empty(2, 3, 4)) is None
    assert shard_placement("galore", ranks=4, proj_type="left")(torch.empty(20, 12)) == Shard(1)


def test_placement_leaves_methods_alone_that_gain_nothing() -> None:
    for method in ("muon", "adamw", "sgd", "flora"):
        assert shard_placement(method, ranks=4)(torch.empty(12, 20)) is None


def test_placement_refuses_unknown_methods_and_options() -> None:
    with pytest.raises(ValueError, match="is not known"):
        shard_placement("galoer", ranks=2)
    with pytest.raises(TypeError, match="rang"):
        shard_placement("galore", ranks=2, rang=4)


def with_placement(mesh: DeviceMesh) -> tuple[Weights, set[str]]:
    """A run with matrices cut for projection from the left, and how they were updated."""
    placement = shard_placement("galore", proj_type="left")
    problem = sharded("galore", mesh, {"shard_placement_fn": placement}, proj_type="left")
    problem.run(range(STEPS))
    model, sharding = problem.model, problem.optimizer.sharding
    assert sharding is not None
    matrices = (model.first.weight, model.second.weight, model.wide.weight)
    return whole(problem), {sharding.place_of(matrix).way for matrix in matrices}


def test_fully_shard_with_the_placement_updates_left_projected_matrices_in_pieces(
    pool: Pool,
) -> None:
    weights, ways = pool.run(with_placement, ranks=2)[0]
    alone = Problem("galore", proj_type="left")
    alone.run(range(STEPS))
    assert ways == {"slices"}
    assert difference(weights, whole(alone)) < 1e-5


def change_refresh(mesh: DeviceMesh) -> str:
    """What is said to a policy that pieces cannot follow, in the middle of a run."""
    _, optimizer = train_on_given(mesh, "galore", steps=2)
    optimizer.param_groups[0]["update_proj_gap"] = GAP  # is no change of the way
    optimizer.composition(0)
    optimizer.param_groups[0]["refresh"] = "lazy"
    try:
        optimizer.composition(0)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_refresh_policy_that_pieces_cannot_follow_is_refused_in_a_run(pool: Pool) -> None:
    assert all("build a new optimizer" in said for said in pool.run(change_refresh, ranks=2))


def mixed(mesh: DeviceMesh, method: str) -> float:
    """Some parameters sharded, the others plain tensors on every rank."""
    plain = ("lm_head.weight", "block.1.q.weight", "block.0.norm.weight")
    weights, _ = train_on_given(mesh, method, plain=plain)
    return difference(weights, train_on_given(None, method)[0])


def test_plain_parameters_next_to_sharded_ones_are_updated_as_in_one_process(pool: Pool) -> None:
    for method in ("galore", "muon", "swats", "subset_norm"):
        assert max(pool.run(mixed, method, ranks=2)) < 2e-6


def in_bf16(mesh: DeviceMesh, method: str) -> float:
    how = {"dtype": torch.bfloat16, "stochastic_rounding": False}
    weights, _ = train_on_given(mesh, method, **how)
    return difference(weights, train_on_given(None, method, **how)[0])


@pytest.mark.parametrize("method", ["galore", "dct_adamw", "muon"])
def test_bf16_weights_rounded_to_nearest_are_those_of_one_process(pool: Pool, method: str) -> None:
    assert max(pool.run(in_bf16, method, ranks=2)) < 2**-7  # one rounding


def rounded_piece(mesh: DeviceMesh) -> torch.Tensor:
    """This rank's piece of a weight all of whose rows are equal, after a rounded step."""
    whole = torch.ones(4, 256, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    weight.grad = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    optimizer = SGD([("w", weight)], lr=1e-3, stochastic_rounding=True)
    optimizer.step()
    return weight.detach().to_local()


def test_stochastic_rounding_draws_its_own_noise_on_every_rank(pool: Pool) -> None:
    first, second = pool.run(rounded_piece, ranks=2)
    assert not torch.equal(first, second)
    mean = torch.cat([first, second]).float().mean().item()
    assert abs(mean - (1.0 - 1e-3)) < 3e-4
