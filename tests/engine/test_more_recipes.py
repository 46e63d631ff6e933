"""Laws and limits of COAP's transport, GaLore+'s sparse moments, and the recipes around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan.optim import Composed, Composition
from subspan.optim.parts.adafactor import Adafactor
from subspan.optim.parts.descent import SGD
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Lift
from subspan.optim.parts.refresh import Refresh
from subspan.optim.parts.sparse import SparseMoments, _largest
from subspan.optim.parts.transport import ProjectionAware, Reproject
from subspan.optim.parts.unit_step import CorrectedAdam
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.finders import SVD, RandomizedSVD, RandomOrthogonal
from subspan.subspaces.finders_sampled import HeadSketch

SHAPES = [(12, 20), (20, 12), (16, 16)]


def gradient(step: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(
    optimizer: type | str, shape: tuple[int, int], steps: int = 9, **options: Any
) -> torch.Tensor:
    """The weight after some steps of a recipe or, for `Composed`, of a composition."""
    weight = nn.Parameter(gradient(0, *shape).clone())
    if isinstance(optimizer, str):
        made = optim.build(optimizer, [weight], **options)
    else:
        made = optimizer([weight], **options)
    for step in range(1, steps + 1):
        weight.grad = gradient(step, *shape)
        made.step()
    return weight.detach()


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


COMMON = {"lr": 1e-2, "rank": 4, "update_proj_gap": 4}


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("shape", SHAPES)
def test_tracking_with_step_size_zero_is_one_fixed_subspace(shape: tuple[int, int]) -> None:
    options = {"convention": "torch", "recovery_scaling": False, "scale": 1.0}
    tracked = trained("subtrack_pp", shape, step_size=0.0, **options, **COMMON)
    fixed = Composition(Adam(eps=1e-6), finder=SVD(), rank=4, refresh=Refresh())
    close(tracked, trained(Composed, shape, composition=fixed, lr=1e-2), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("finder", ["svd", "randomized"])
def test_galore2_is_galore_with_the_same_finder(shape: tuple[int, int], finder: str) -> None:
    options = {"finder": finder, "scale": 0.25, **COMMON}
    assert torch.equal(trained("galore2", shape, **options), trained("galore", shape, **options))


def test_galore2_projects_square_matrices_on_the_side_of_its_tie() -> None:
    for tie in ("left", "right"):
        optimizer = optim.build("galore2", [nn.Parameter(torch.ones(8, 8))], rank=2, tie=tie)
        assert optimizer.layout_of(optimizer.param_groups[0]["params"][0]).side == tie
    with pytest.raises(ValueError, match="tie='up'"):
        optim.build("galore2", [nn.Parameter(torch.ones(8, 8))], rank=2, tie="up")


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_plus_without_heads_and_sparse_part_is_galore(shape: tuple[int, int]) -> None:
    options = {"scale": 0.25, **COMMON}
    plus = trained("galore_plus", shape, density=0, **options)
    close(plus, trained("galore", shape, finder=RandomizedSVD(oversampling=8), **options))


@pytest.mark.parametrize("shape", SHAPES)
def test_sara_at_full_rank_has_nothing_to_draw(shape: tuple[int, int]) -> None:
    options = COMMON | {"rank": min(shape), "update_proj_gap": 100}
    close(trained("sara", shape, **options), trained("galore", shape, finder="svd", **options))


@pytest.mark.parametrize("shape", SHAPES)
def test_sara_on_fira_is_fira_with_its_finder(shape: tuple[int, int]) -> None:
    sampled = trained("sara", shape, base="fira", scale=0.5, **COMMON)
    close(sampled, trained("fira", shape, finder="sara", alpha=0.5, **COMMON))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner", ["adamw", "adafactor"])
def test_coap_without_nudges_is_galore_until_it_recomputes(
    shape: tuple[int, int], inner: str
) -> None:
    options = {"inner": inner, "scale": 0.25, **COMMON}
    still = trained("coap", shape, nudge_lr=0.0, sketch_seed=1, **options)
    fixed = trained("coap", shape, **(options | {"update_proj_gap": 100}), sketch_seed=1)
    close(still, fixed)
    assert not torch.allclose(still, trained("coap", shape, sketch_seed=1, **options))


# ---------------------------------------------------------------- COAP's transport


def test_restoring_turns_the_moments_as_the_lifted_ones_project() -> None:
    """Against full-size products, for one side and both."""
    old_left, new_left = gradient(1, 12, 3), gradient(2, 12, 3)
    old_right, new_right = gradient(3, 20, 3), gradient(4, 20, 3)
    cases: list[tuple[Any, Any, Any, tuple[int, int]]] = [
        ("left", (old_left, torch.eye(20)), (new_left, torch.eye(20)), (3, 20)),
        ("right", (torch.eye(12), old_right), (torch.eye(12), new_right), (12, 3)),
        ("both", (old_left, old_right), (new_left, new_right), (3, 3)),
    ]
    for side, old, new, shape in cases:
        old, new = [[x.double() for x in pair] for pair in (old, new)]
        mean, square = gradient(5, *shape), gradient(6, *shape).square()
        state = {"exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
        changes = [n.mT @ o for n, o in zip(new, old, strict=True)]
        change: Any = tuple(changes) if side == "both" else changes[side == "right"]
        Reproject().apply(Adam(), state, change, side, 5)
        for moment, before in (("exp_avg", mean), ("exp_avg_sq", square.sqrt())):
            expected = new[0].mT @ (old[0] @ before @ old[1].mT) @ new[1]
            close(state[moment], expected if moment == "exp_avg" else expected.square(), 1e-9)


def test_restoring_leaves_a_factored_second_moment_alone() -> None:
    options = {"inner": "adafactor", "beta1": 0.9, "restore_state": True, **COMMON}
    assert trained("coap", (12, 20), **options).isfinite().all()
    with pytest.raises(ValueError, match="ProjectionAware cannot move inner Adafactor"):
        Composition(Adafactor(0.9), finder=SVD(), transport=ProjectionAware())


def test_coap_runs_with_adafactor_without_a_first_moment() -> None:
    weight = nn.Parameter(gradient(0, 12, 20).clone())
    optimizer = optim.build("coap", [weight], inner="adafactor", **COMMON)
    for step in range(1, 10):
        weight.grad = gradient(step, 12, 20)
        optimizer.step()
    assert weight.isfinite().all() and "exp_avg" not in optimizer.state[weight]
    with pytest.raises(ValueError, match="nothing to move"):
        optim.build("coap", [weight], inner="adafactor", restore_state=True)


# ---------------------------------------------------------------- options of SubTrack++


def test_corrected_adam_takes_the_steps_of_adam() -> None:
    for convention in ("hf", "torch"):
        plain, corrected = Adam(convention=convention), CorrectedAdam(convention=convention)  # type: ignore[arg-type]
        states = [{"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)} for _ in "ab"]
        for age in range(1, 5):
            x = gradient(age, 3, 4).float()
            one = plain.update(x, states[0], age, 0.1, Workspace())
            other = corrected.update(x, states[1], age, 0.1, Workspace())
            assert other.step == 0.1
            close(other.value * other.step, one.value * one.step, 1e-7)


@pytest.mark.parametrize("method", ["subtrack_pp", "grasswalk", "grassjump"])
def test_scaled_residual_scales_the_whole_update(method: str) -> None:
    options = {"growth_limit": None, **COMMON}
    start = gradient(0, 12, 20)
    whole = trained(method, (12, 20), scale=1.0, **options) - start
    scaled = trained(method, (12, 20), scale=0.25, scale_residual=True, **options) - start
    close(scaled, 0.25 * whole)


@pytest.mark.parametrize("bad", [{"scale_residual": True}, {"finder": "svd"}])
def test_released_subtrack_is_refused_with_what_it_does_not_have(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="as_released=True needs"):
        optim.build("subtrack_pp", [nn.Parameter(torch.ones(4, 6))], as_released=True, **bad)


def test_grassjump_regenerates_its_basis_from_a_seed() -> None:
    stored, seeded = (
        trained("grassjump", (12, 20), storage={"basis": basis}, **COMMON)
        for basis in ("parameter", "seed")
    )
    assert torch.equal(stored, seeded)


# ---------------------------------------------------------------- sparse moments


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_part_is_adam_on_the_largest_entries_of_the_residual(shape: tuple[int, int]) -> None:
    """Against a dense simulation that remembers every residual of the warm-up."""
    density, warmup, steps, lr, scale = 0.1, 3, 8, 0.01, 0.5
    basis = RandomOrthogonal()
    parts = {"finder": basis, "rank": 4, "refresh": Refresh(), "output": Lift(scale)}
    dense = Composition(SGD(), **parts)
    sparse = Composition(SGD(), remainder=SparseMoments(density, warmup), **parts)
    weights = [nn.Parameter(gradient(0, *shape).clone()) for _ in range(2)]
    optimizers = [
        Composed([w], composition=c, lr=lr) for w, c in zip(weights, (dense, sparse), strict=True)
    ]
    residuals = []
    for step in range(1, steps + 1):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient(step, *shape)
            optimizer.step()
        state = optimizers[1].state[weights[1]]
        layout, q = optimizers[1].layout_of(weights[1]), state["basis"]
        projector = q @ q.mT
        x = gradient(step, *shape)
        residuals.append(x - (projector @ x if layout.side == "left" else x @ projector))
    count = int(density * shape[0] * shape[1])
    best = torch.stack(residuals[:warmup]).abs().amax(0).flatten()
    chosen = best.topk(count).indices
    assert set(state["sparse_index"].tolist()) == set(chosen.tolist())

    mean, square, total = torch.zeros(3, count, dtype=torch.float64)
    for age, residual in enumerate(residuals[warmup:], 1):
        part = residual.flatten()[chosen]
        mean, square = 0.9 * mean + 0.1 * part, 0.999 * square + 0.001 * part**2
        correction = (1 - 0.999**age) ** 0.5 / (1 - 0.9**age)
        total += lr * scale * correction * mean / (square.sqrt() + 1e-6)
    expected = weights[0].detach().clone().flatten()
    expected[chosen] -= total
    close(weights[1].detach().flatten(), expected, 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_largest_of_a_matrix_are_found_among_few_candidates(seed: int) -> None:
    squares = gradient(seed, 900).square()
    kept = squares[:300].topk(20).values
    values, places = _largest(squares, kept)
    assert torch.equal(values, squares.sort(descending=True).values[:20])
    assert torch.equal(squares[places], values)
    squares[7] = float("nan")
    assert 7 in _largest(squares, torch.full((20,), float("nan")))[1]


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["matrix", "stack"])
def test_chosen_entries_of_the_residual_are_those_of_all(proj_type: str, lead: tuple) -> None:
    options: dict[str, Any] = {"warmup": 1, "density": 0.2, "rank": 3, "proj_type": proj_type}
    options["finder"] = "svd"
    weight = nn.Parameter(gradient(0, *lead, 12, 17).clone())
    optimizer = optim.build("galore_plus", [weight], stacked=True, eps=1.0, lr=1.0, **options)
    for step in (1, 2):
        weight.grad = gradient(step, *lead, 12, 17)
        optimizer.step()
    subspace = optimizer.subspace_of(weight)
    residual = subspace.residual(weight.grad).flatten(-2)
    index = optimizer.state[weight]["sparse_index"].long()
    close(optimizer.state[weight]["sparse_exp_avg"], 0.1 * residual.gather(-1, index), 1e-9)


def test_sparse_part_of_full_rank_keeps_nothing() -> None:
    weight = nn.Parameter(gradient(0, 6, 10).clone())
    optimizer = optim.build("galore_plus", [weight], rank=6, warmup=1, density=0.5)
    weight.grad = gradient(1, 6, 10)
    optimizer.step()
    assert not any(name.startswith("sparse") for name in optimizer.state[weight])


@pytest.mark.parametrize("bad", [{"density": -0.1}, {"density": 1.5}, {"warmup": 0}])
def test_impossible_sparse_part_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        optim.build("galore_plus", [nn.Parameter(torch.ones(4, 6))], **bad)


def test_named_projections_share_one_heads_subspace_inside_an_optimizer() -> None:
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    # Each head of 8 rows has a subspace of its own, so the basis shows which head was looked at.
    heads = [
        torch.randn(8, 4, generator=generator) @ frame[:, 4 * i : 4 * i + 4].mT for i in range(4)
    ]
    weights = {
        name: nn.Parameter(torch.zeros(32, 24)) for name in ("a.q_proj.weight", "a.up.weight")
    }
    optimizer = optim.build(
        "galore_plus", list(weights.items()), rank=4, finder=HeadSketch(head_dim=8)
    )
    for weight in weights.values():
        weight.grad = torch.cat(heads)
    optimizer.step()
    shares = {
        name: [
            float((head @ optimizer.state[weight]["basis"]).norm() / head.norm()) for head in heads
        ]
        for name, weight in weights.items()
    }
    assert sorted(round(share, 4) for share in shares["a.q_proj.weight"]) == [0, 0, 0, 1]
    assert sum(share > 0.01 for share in shares["a.up.weight"]) > 1
