"""Subset-Norm and Subspace-Momentum against the trajectories of their released code, and against
the published formulas in float64."""

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

SM = {"rank": 8, "update_proj_gap": 10, "as_released": True}
BOTH = "subset_norm_subspace_momentum"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "snsm_adamw_sn_heuristics": ("subset_norm", {}),
    "snsm_adamw_sn_half_sqrt": ("subset_norm", {"subset_size": -2}),
    "snsm_adamw_sn_subset16": ("subset_norm", {"subset_size": 16}),
    # Its bias belonged to a group with one second moment per entry.
    "snsm_adamwsn_general": ("subset_norm", {"subset_size": -2}),
    "snsm_adagrad_sn_heuristics": ("subset_norm", {"base": "adagrad"}),
    "snsm_rmsprop_sn_heuristics": ("subset_norm", {"base": "rmsprop"}),
    "snsm_adamw_sm_svd": ("subspace_momentum", {"projection": "svd", **SM}),
    "snsm_sgd_sm_svd": ("subspace_momentum", {"base": "sgd", "projection": "svd", **SM}),
    "snsm_adamw_snsm_svd": (BOTH, {"projection": "svd", **SM}),
    "snsm_adamw_snsm_uniform": (BOTH, {"projection": "uniform", **SM}),
    "snsm_adamw_snsm_topk": (BOTH, {"projection": "topk", **SM}),
    "snsm_adagrad_snsm_svd": (BOTH, {"base": "adagrad", "projection": "svd", **SM}),
}
# Entries of the first gradient near 0 are divided by themselves.
TOLERANCE = {"snsm_adamw_sm_svd": 2e-5}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_trajectory(name: str) -> None:
    recording, _ = load(name)
    method, options = CASES[name]
    if method != "subset_norm":
        options = options | {"finder": Replay(recorded_bases(recording))}
    follow(
        lambda weights: optim.build(method, list(weights.items()), lr=1e-2, **options),
        recording,
        tolerance=TOLERANCE.get(name, 1e-6),
    )


def test_rows_and_columns_of_largest_norm_are_the_official_ones() -> None:
    recording, _ = load("snsm_adamw_snsm_topk")
    given, _ = load("inputs")
    for parameter, steps in recorded_bases(recording).items():
        weight = torch.nn.Parameter(given[f"init/{parameter}"].clone())
        optimizer = optim.build(BOTH, [weight], projection="topk", rank=8, update_proj_gap=10)
        for step in range(1, 41):
            weight.grad = given[f"grad/{step:02d}/{parameter}"].clone()
            optimizer.step()
            if step in steps:
                ours = optimizer.state[weight]["index"].tolist()
                assert sorted(ours) == sorted(steps[step].tolist())


def draws(shape: tuple[int, ...], steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=generator, dtype=torch.float64)


def trained(method: str, gradients: Tensor, **options: Any) -> Tensor:
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = optim.build(method, [weight], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def subsets(shape: tuple[int, ...], size: int | str) -> Tensor:
    """Which subset every entry belongs to, numbered."""
    if size == "heuristics":
        m, n = shape
        rows, columns = torch.meshgrid(torch.arange(m), torch.arange(n), indexing="ij")
        return rows if m >= n else columns
    count = math.prod(shape)
    length = max(d for d in range(1, int(size) + 1) if count % d == 0)
    return torch.arange(count).view(shape) // length


def whole(gradient: Tensor) -> Tensor:
    return gradient


def adam(
    gradients: Tensor,
    numbers: Tensor,
    decay: float = 0.0,
    inside: Callable[[Tensor], Tensor] = whole,
    gap: int = 1000,
) -> Tensor:
    """Adam with second moments per subset and momentum only for the part `inside` a subspace. As
    published, the momentum starts again at steps gap, 2 gap, ..."""
    weight = torch.zeros_like(gradients[0])
    first, second = torch.zeros_like(weight), torch.zeros(int(numbers.max()) + 1).double()
    for step, gradient in enumerate(gradients, 1):
        if step % gap == 0:
            first = torch.zeros_like(first)
        first = 0.8 * first + 0.2 * inside(gradient)
        squares = torch.zeros_like(second)
        squares.index_add_(0, numbers.flatten(), gradient.flatten() ** 2)
        second = 0.99 * second + 0.01 * squares
        numerator = first + gradient - inside(gradient)
        size = 0.01 * math.sqrt(1 - 0.99**step) / (1 - 0.8**step)
        weight = weight - size * numerator / (second[numbers].sqrt() + 1e-6)
        weight = weight * (1 - 0.01 * decay)
    return weight


SIZES = ["heuristics", 6, 12]
ADAM = {"betas": (0.8, 0.99), "lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_subset_norm_equals_the_published_formulas(shape: tuple[int, int], size: Any) -> None:
    gradients = draws(shape, 9)
    ours = trained("subset_norm", gradients, subset_size=size, **ADAM)
    expected = adam(gradients, subsets(shape, size), 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 8)])
def test_snsm_equals_the_published_formulas(shape: tuple[int, int], size: Any) -> None:
    """The basis stays the same, so that what happens to the momentum at a refresh shows alone."""
    gradients = draws(shape, 9)
    basis = torch.linalg.qr(draws((8, 3), 1, seed=1)[0])[0]
    projector, left = basis @ basis.T, shape[0] < shape[1]

    def inside(gradient: Tensor) -> Tensor:
        return projector @ gradient if left else gradient @ projector

    finder = Replay({0: {1: basis}})
    ours = trained(
        BOTH, gradients, rank=3, update_proj_gap=4, finder=finder, subset_size=size, **ADAM
    )
    expected = adam(gradients, subsets(shape, size), 0.1, inside, gap=4)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [3, -2])
def test_subsets_everywhere_include_vectors(size: int) -> None:
    """sqrt(48) / 2, rounded down, is 3, which divides 48."""
    gradients = draws((48,), 7)
    options = ADAM | {"weight_decay": 0.0}
    ours = trained("subset_norm", gradients, subset_size=size, everywhere=True, **options)
    expected = adam(gradients, subsets((48,), 3))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (5,), (4, 3, 3)])
def test_subsets_of_one_entry_are_adam(shape: tuple[int, ...]) -> None:
    gradients = draws(shape, 6)
    options = {**ADAM, "eps": 1e-6}
    ours = trained("subset_norm", gradients, subset_size=1, everywhere=True, **options)
    # GaLore without a rank is Adam in the same convention: eps before the bias correction.
    theirs = trained("galore", gradients, rank=None, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
@pytest.mark.parametrize("base", ["adamw", "adagrad", "sgd"])
def test_full_rank_subspace_momentum_is_the_base_optimizer(
    shape: tuple[int, int], base: str
) -> None:
    gradients = draws(shape, 6)
    options = {"base": base, "lr": 0.01, "update_proj_gap": 1000}
    ours = trained("subspace_momentum", gradients, rank=8, **options)
    expected = torch.zeros(shape, dtype=torch.float64)
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient
        rate = 1.0 if base == "adagrad" else 0.999
        second = rate * second + (1 - 0.999 if rate < 1 else 1) * gradient**2
        size, root = 0.01, second.sqrt() + 1e-6
        if base == "adamw":
            size *= math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        expected -= size * (first if base == "sgd" else first / root)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_late_restart_differs_from_the_published_one_at_a_refresh_only() -> None:
    gradients = draws((8, 12), 6)
    options = {"rank": 3, "update_proj_gap": 4, "lr": 0.01, "projection": "svd"}
    for steps, equal in ((3, True), (4, False)):
        ours, theirs = (
            trained("subspace_momentum", gradients[:steps], as_released=released, **options)
            for released in (False, True)
        )
        assert torch.equal(ours, theirs) == equal


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        ("subset_norm", {"base": "sgd"}),
        ("subset_norm", {"subset_size": 0}),
        ("subspace_momentum", {"base": "rmsprop"}),
        ("subspace_momentum", {"projection": "srht"}),
        (BOTH, {"base": "sgd"}),
    ],
)
def test_choices_that_do_not_exist_are_refused_by_name(method: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        optim.build(method, [torch.nn.Parameter(torch.zeros(4, 4))], **bad)
