"""Ranks chosen by energy within a budget, and states that follow a changed rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan.subspaces.ranks import EnergyRank, energies, ranks_for


def low_rank(seed: int, m: int, n: int, rank: int, noise: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=generator)
    right = torch.randn(rank, n, generator=generator)
    return left @ right + noise * torch.randn(m, n, generator=generator)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_rank_is_the_smallest_that_holds_the_share(share, seed):
    gradient = torch.randn(30, 50, generator=torch.Generator().manual_seed(seed))
    (rank,) = ranks_for([energies(gradient)], [1], EnergyRank(share=share, smallest=1))
    values = torch.linalg.svdvals(gradient.double()).square()
    held = values.cumsum(0) / values.sum()
    assert held[rank - 1] >= share - 1e-9
    assert rank == 1 or held[rank - 2] < share


@pytest.mark.parametrize("budget", [80, 100, 173, 250, 10_000])
def test_a_budget_is_kept_and_goes_where_a_byte_holds_most(budget):
    spectra = [energies(low_rank(seed, 20, 40, 3 * seed + 2, 0.1)) for seed in range(4)]
    costs = [3, 5, 7, 2]
    policy = EnergyRank(share=0.95, budget=budget, smallest=2)
    ranks = ranks_for(spectra, costs, policy)
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    free = ranks_for(spectra, costs, EnergyRank(share=0.95, smallest=2))
    assert spent <= budget
    assert all(2 <= rank <= most for rank, most in zip(ranks, free, strict=True))
    if budget == 10_000:
        assert ranks == free
    # What was given holds more per byte than the first direction of its matrix that was not, unless
    # that one no longer fitted.
    for given in range(4):
        for other in range(4):
            if ranks[given] > 2 and ranks[other] < free[other] and spent + costs[other] <= budget:
                last = float(spectra[given][ranks[given] - 1]) / costs[given]
                assert last >= float(spectra[other][ranks[other]]) / costs[other]


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(ValueError, match="budget=10 bytes cannot hold rank 4"):
        ranks_for([energies(torch.eye(8))], [3], EnergyRank(budget=10))


@pytest.mark.parametrize(
    "options",
    [{"share": 0.0}, {"share": 2.0}, {"smallest": 0}, {"budget": -1}, {"largest": 2}],
    ids=str,
)
def test_impossible_policies_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        EnergyRank(**options)


def run(optimizer, weights, steps, ranks):
    for step in steps:
        for number, weight in enumerate(weights):
            rank = ranks[step // 4 % len(ranks)]
            weight.grad = low_rank(10 * step + number, *weight.shape, rank)
        optimizer.step()


@pytest.mark.parametrize("method", ["galore", "fira", "ldadam", "subtrack_pp"])
@pytest.mark.parametrize("storage", ["parameter", "int8"])
def test_ranks_follow_the_gradient_and_the_run_resumes_bit_for_bit(method, storage):
    def build():
        generator = torch.Generator().manual_seed(0)
        weights = [
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((24, 40), (40, 24))
        ]
        options = {"rank": EnergyRank(share=0.999, smallest=1), "storage": storage}
        if "update_proj_gap" in optim.methods()[method].defaults:
            options["update_proj_gap"] = 4
        return weights, optim.build(method, weights, lr=1e-2, **options)

    weights, optimizer = build()
    seen = []
    for step in range(16):
        run(optimizer, weights, [step], [3, 6, 2])
        seen.append([optimizer.layout_of(weight).rank for weight in weights])
        if step == 9:
            middle = [weight.detach().clone() for weight in weights]
            saved = copy.deepcopy(optimizer.state_dict())
    if method != "ldadam":  # its fed-back error is of full rank
        assert [ranks[0] for ranks in seen[::4]] == [3, 6, 2, 3]
    shapes = {
        name: v.shape for name, v in optimizer.state[weights[0]].items() if hasattr(v, "shape")
    }
    assert shapes["basis"][-1] == seen[-1][0] or storage == "int8"
    again, second = build()
    second.load_state_dict(saved)
    for weight, value in zip(again, middle, strict=True):
        weight.data.copy_(value)
    run(second, again, range(10, 16), [3, 6, 2])
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_state_bytes_stay_within_the_budget():
    weights = [nn.Parameter(torch.zeros(64, 96)) for _ in range(3)]
    budget = 3 * 40_000
    optimizer = optim.GaLore(weights, rank=EnergyRank(0.99, budget=budget), update_proj_gap=2)
    for step in range(6):
        for number, weight in enumerate(weights):
            weight.grad = low_rank(step, 64, 96, 5 + 20 * number, 0.05)
        optimizer.step()
        assert optimizer.state_bytes()["total"] <= budget
    ranks = [optimizer.layout_of(weight).rank for weight in weights]
    assert ranks[0] < ranks[2]


def test_finders_without_a_basis_from_gradients_are_refused():
    with pytest.raises(ValueError, match="EnergyRank"):
        optim.APOLLO([nn.Parameter(torch.zeros(8, 8))], rank=EnergyRank())
