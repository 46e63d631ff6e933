"""Finders that walk, draw, nudge or look at one head, against slow but plain computations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from subspan import linalg
from subspan.subspaces import Dense, TwoSided, captured_energy, geodesic, horizontal
from subspan.subspaces.finder import Finder, Sight
from subspan.subspaces.finders_coap import CoapNudge, loss_slope, sketched_rows
from subspan.subspaces.finders_grassmann import GrassmannTracking, GrassmannWalk, track, walk
from subspan.subspaces.finders_sampled import (
    HeadSketch,
    ImportanceSampledSVD,
    sample_without_replacement,
)
from subspan.subspaces.layout import Layout

SEEDS = range(3)
SHAPES = [(12, 20), (20, 12), (16, 16)]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(normal(seed, *shape, dtype=dtype))[0]


def gram_error(basis: Tensor) -> float:
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return float((basis.mT @ basis - identity).abs().amax())


def layouts(*shape: int, side: str, rank: int, names: tuple[str, ...] = ("0",)) -> list[Layout]:
    return [
        Layout(i, name, shape, shape, side, rank, True)  # type: ignore[arg-type]
        for i, name in enumerate(names)
    ]


def sight(gradient: Tensor, side: str, rank: int, **given: Any) -> Sight:
    """A refresh of one matrix, or of one per leading entry of the gradient."""
    count = 1 if gradient.ndim == 2 else len(gradient)
    names = given.pop("names", tuple(map(str, range(count))))
    many = layouts(*gradient.shape[-2:], side=side, rank=rank, names=names)
    values: dict[str, Any] = {
        "previous": None,
        "momentum": None,
        "seeds": list(range(count)),
        "state": {"refreshed": [1] * count},
        "step": 5,
    }
    return Sight(gradient, many[0], many, **(values | given))


def found(finder: Finder, given: Sight) -> Tensor:
    subspace = finder.find(given)
    assert isinstance(subspace, Dense) and subspace.side == given.layout.side
    return subspace.basis


# ---------------------------------------------------------------- walking


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", [1e-3, 0.3, 20.0])
def test_tracking_step_is_that_of_the_explicit_residual(seed: int, step: float) -> None:
    basis, x = orthonormal(seed, 2, 12, 3), normal(seed + 10, 2, 12, 20)
    inside = basis.mT @ x
    tangent = -2 * (x - basis @ inside) @ inside.mT
    expected = geodesic(basis, tangent, -step, rank=1)
    torch.testing.assert_close(track(basis, x, step), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_short_tracking_step_captures_more_of_the_gradient(seed: int) -> None:
    basis, x = orthonormal(seed, 12, 3), normal(seed + 10, 12, 20)
    moved = track(basis, x, 1e-3)
    assert captured_energy(x, Dense("left", moved)) > captured_energy(x, Dense("left", basis))


def test_gradient_inside_the_subspace_leaves_it_where_it_is() -> None:
    basis = orthonormal(0, 40, 6, dtype=torch.float32)
    moved = track(basis, basis @ normal(1, 6, 50, dtype=torch.float32), 0.1)
    torch.testing.assert_close(moved @ moved.mT, basis @ basis.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalise", [False, True])
def test_walk_is_the_exponential_map(seed: int, normalise: bool) -> None:
    basis, x = orthonormal(seed, 2, 12, 3), normal(seed + 10, 2, 12, 3)
    tangent = horizontal(basis, x)
    if normalise:
        tangent = tangent / torch.linalg.matrix_norm(tangent, 2, keepdim=True)
    expected = geodesic(basis, tangent, 0.4)
    walked = walk(basis, x, 0.4, normalise=normalise)
    torch.testing.assert_close(walked, expected, rtol=0, atol=1e-12)


def test_normalised_walk_turns_by_at_most_its_step() -> None:
    basis = orthonormal(0, 30, 4)
    walked = walk(basis, normal(1, 30, 4), 0.3, normalise=True)
    smallest = torch.linalg.svdvals(basis.mT @ walked)[-1]
    assert float(smallest) == pytest.approx(math.cos(0.3), abs=1e-12)


@pytest.mark.parametrize("move", ["track", "walk", "walk far"])
def test_basis_stays_orthonormal_over_1000_refreshes(move: str) -> None:
    basis = orthonormal(0, 24, 6, dtype=torch.float32)
    for seed in range(1000):
        if move == "track":
            basis = track(basis, normal(seed, 24, 30, dtype=torch.float32), 10.0)
        else:
            x = normal(seed, 24, 6, dtype=torch.float32)
            basis = walk(basis, x, 0.1 if move == "walk" else 10.0, normalise=move == "walk")
    assert gram_error(basis) < 2e-6


@pytest.mark.parametrize("finder", [GrassmannTracking(5.0), GrassmannWalk()])
def test_walk_from_a_coarsely_rounded_basis_is_nearly_orthonormal(finder: Finder) -> None:
    basis = orthonormal(7, 64, 8, dtype=torch.float32).bfloat16()
    gradient = normal(1, 64, 80, dtype=torch.float32)
    moved = found(finder, sight(gradient, "left", 8, previous=Dense("left", basis)))
    assert moved.dtype == torch.float32
    assert gram_error(moved) < 0.02 * gram_error(basis.float())


@pytest.mark.parametrize("finder", [GrassmannTracking(0.0), GrassmannWalk(0.0)])
def test_walk_of_length_zero_stays(finder: Finder) -> None:
    basis = orthonormal(0, 12, 3)
    moved = found(finder, sight(normal(1, 12, 20), "left", 3, previous=Dense("left", basis)))
    torch.testing.assert_close(moved, basis, rtol=0, atol=1e-14)


@pytest.mark.parametrize("finder", [GrassmannTracking(), GrassmannWalk()])
def test_full_rank_subspace_has_nowhere_to_go(finder: Finder) -> None:
    basis = orthonormal(0, 12, 12, dtype=torch.float32)
    gradient = normal(1, 12, 20, dtype=torch.float32)
    moved = found(finder, sight(gradient, "left", 12, previous=Dense("left", basis)))
    torch.testing.assert_close(moved, basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("finder", [GrassmannTracking(1.0), GrassmannWalk(), CoapNudge()])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4])
def test_basis_is_finite_for_any_size_of_the_gradient(finder: Finder, scale: float) -> None:
    gradient = scale * normal(1, 12, 20, dtype=torch.float32)
    first = finder.find(sight(gradient, "left", 3))
    momentum = scale * normal(2, 3, 20, dtype=torch.float32)
    moved = found(finder, sight(gradient, "left", 3, previous=first, momentum=momentum))
    assert moved.isfinite().all()


@pytest.mark.parametrize(
    "finder", [GrassmannTracking(0.1), GrassmannWalk(), CoapNudge(), ImportanceSampledSVD()]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_right_side_is_the_left_side_of_the_transpose(
    finder: Finder, shape: tuple[int, int]
) -> None:
    gradient, d = normal(0, *shape), shape[1]
    for previous in (None, orthonormal(1, d, 3)):
        right, left = (
            found(
                finder,
                sight(x, side, 3, previous=None if previous is None else Dense(side, previous)),
            )
            for x, side in ((gradient, "right"), (gradient.mT.contiguous(), "left"))
        )
        torch.testing.assert_close(right @ right.mT, left @ left.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "finder",
    [GrassmannTracking(0.1), GrassmannWalk(), CoapNudge(), ImportanceSampledSVD(), HeadSketch(4)],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_matrices_gives_the_bases_of_each(finder: Finder, side: str) -> None:
    gradient, momentum = (
        normal(0, 3, 12, 20),
        normal(2, 3, *((3, 20) if side == "left" else (12, 3))),
    )
    names = ("a.q_proj.weight", "b.mlp.weight", "c.attn.o_proj.weight")
    previous = orthonormal(1, 3, 12 if side == "left" else 20, 3)
    given = {"names": names, "momentum": momentum, "previous": Dense(side, previous)}
    together = found(finder, sight(gradient, side, 3, **given))
    for row, name in enumerate(names):
        given = {"names": (name,), "momentum": momentum[row], "seeds": [row]}
        given["previous"] = Dense(side, previous[row])
        alone = found(finder, sight(gradient[row], side, 3, **given))
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-9)


def test_released_tracking_leaves_bases_on_the_right_where_they_are() -> None:
    previous = Dense("right", orthonormal(0, 12, 3))
    finder = GrassmannTracking(0.1, as_released=True)
    assert finder.find(sight(normal(1, 20, 12), "right", 3, previous=previous)) is previous
    assert [d.name for d in finder.declare(sight(normal(1, 20, 12), "right", 3).layout)] == [
        "basis",
        "first_basis",
    ]


@pytest.mark.parametrize("step_size", [-1.0, math.nan, math.inf, True, "far"])
@pytest.mark.parametrize("finder", [GrassmannTracking, GrassmannWalk])
def test_impossible_step_size_is_refused(finder: Any, step_size: Any) -> None:
    with pytest.raises(ValueError, match="step_size="):
        finder(step_size)


# ---------------------------------------------------------------- drawing


def test_draws_are_successive_draws_without_replacement() -> None:
    weights, count = torch.tensor([4.0, 3.0, 2.0, 1.0]), 2
    noise = torch.empty(40_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = sample_without_replacement(weights.expand(40_000, 4), noise, count)
    for pair in itertools.combinations(range(4), 2):
        first, second = (weights[i] for i in pair)
        total = weights.sum()
        chance = first / total * second / (total - first)
        chance = chance + second / total * first / (total - second)
        share = (drawn == torch.tensor(pair)).all(-1).float().mean()
        assert abs(share - chance) < 0.01  # four standard deviations


def test_directions_without_weight_come_last_and_at_random() -> None:
    weights = torch.tensor([1.0, 1e-6, 0.0, 0.0, 0.0])
    noise = torch.empty(500, 5).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = sample_without_replacement(weights.expand(500, 5), noise, 3)
    assert (drawn[:, :2] == torch.tensor([0, 1])).all()
    assert set(drawn[:, 2].tolist()) == {2, 3, 4}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sampled_basis_holds_singular_vectors_in_decreasing_order(
    shape: tuple[int, int], side: str
) -> None:
    gradient = normal(0, *shape)
    basis = found(ImportanceSampledSVD(), sight(gradient, side, 5))
    assert gram_error(basis) < 1e-10
    x = gradient.mT if side == "left" else gradient
    energies = (x @ basis).square().sum(0)
    products = basis.mT @ (x.mT @ x) @ basis
    torch.testing.assert_close(products, torch.diag(energies), rtol=0, atol=1e-9)
    assert (energies.diff() <= 0).all()


def test_sampled_bases_differ_between_refreshes_and_parameters() -> None:
    gradient, finder = normal(0, 24, 30), ImportanceSampledSVD()
    bases = [found(finder, sight(gradient, "left", 4, seeds=[seed])) for seed in (1, 1, 2, 3)]
    assert torch.equal(bases[0], bases[1])
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(bases[1:], 2))


def test_vector_that_is_drawn_again_keeps_its_sign() -> None:
    gradient, finder = normal(0, 6, 30), ImportanceSampledSVD()
    basis = found(finder, sight(gradient, "left", 6))
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], dtype=basis.dtype)
    again = found(finder, sight(gradient, "left", 6, previous=Dense("left", basis * flips)))
    torch.testing.assert_close(again, basis * flips, rtol=0, atol=1e-12)


def test_sampled_basis_of_a_rank_deficient_gradient_holds_all_of_it() -> None:
    gradient = (normal(0, 24, 3) @ normal(1, 3, 30)).float()
    basis = found(ImportanceSampledSVD(), sight(gradient, "left", 5))
    assert gram_error(basis) < 1e-5
    assert float(captured_energy(gradient, Dense("left", basis))) > 1 - 1e-5
    zero = found(ImportanceSampledSVD(), sight(torch.zeros(24, 30), "left", 5))
    assert gram_error(zero) < 1e-5


def test_both_sides_take_the_same_singular_triples() -> None:
    subspace = ImportanceSampledSVD().find(sight(normal(0, 12, 20), "both", 4))
    assert isinstance(subspace, TwoSided)
    core = subspace.left.mT @ normal(0, 12, 20) @ subspace.right
    diagonal = core.diagonal().abs()
    torch.testing.assert_close(core.abs(), torch.diag(diagonal), rtol=0, atol=1e-9)
    assert (diagonal.diff() <= 0).all()


# ---------------------------------------------------------------- nudging


def published_loss(basis: Tensor, gradient: Tensor, momentum: Tensor | None, side: str) -> Tensor:
    """COAP's loss of one matrix, in full size."""
    if side == "left":
        again = basis @ (basis.mT @ gradient)
        lifted = None if momentum is None else basis @ momentum
    else:
        again = gradient @ basis @ basis.mT
        lifted = None if momentum is None else momentum @ basis.mT
    loss = mse_loss(again, gradient)
    return (
        loss if lifted is None else loss * (1 - cosine_similarity(lifted, gradient, dim=1).mean())
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_momentum", [True, False])
def test_slope_is_the_derivative_of_the_published_loss(
    side: str, shape: tuple[int, int], with_momentum: bool
) -> None:
    m, n = shape
    gradient = normal(0, 2, m, n)
    basis = normal(1, 2, m if side == "left" else n, 3)  # not orthonormal
    momentum = normal(2, 2, *((3, n) if side == "left" else (m, 3))) if with_momentum else None
    slope = loss_slope(basis, gradient, momentum, side)  # type: ignore[arg-type]
    for row in range(2):
        leaf = basis[row].clone().requires_grad_()
        own = None if momentum is None else momentum[row]
        published_loss(leaf, gradient[row], own, side).backward()
        torch.testing.assert_close(slope[row], leaf.grad, rtol=1e-10, atol=1e-12)


def test_best_subspace_is_a_stationary_point_without_momentum() -> None:
    gradient = normal(0, 12, 20)
    best = linalg.top_basis(gradient, 4, side="left")
    torch.testing.assert_close(
        loss_slope(best, gradient, None, "left"), torch.zeros(12, 4).double(), rtol=0, atol=1e-12
    )


def test_nudge_is_no_longer_than_its_learning_rate() -> None:
    for scale in (1.0, 100.0):
        gradient, basis = scale * normal(0, 12, 20), orthonormal(1, 12, 3)
        given = sight(gradient, "left", 3, previous=Dense("left", basis), momentum=normal(2, 3, 20))
        step = found(CoapNudge(nudge_lr=0.1), given) - basis
        slope = loss_slope(basis, gradient, given.momentum, "left")
        factor = 0.1 * min(1.0, 1.0 / (float(slope.norm()) + 1e-6))
        torch.testing.assert_close(step, -factor * slope, rtol=0, atol=1e-12)
        assert step.norm() <= 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_recomputed_basis_is_that_of_one_pass_of_randomised_svd(seed: int) -> None:
    x, test = normal(seed, 20, 12), normal(seed + 5, 12, 4)
    inside = torch.linalg.qr(x @ test)[0].mT @ x
    expected = torch.linalg.svd(inside, full_matrices=False)[2].mT
    basis = sketched_rows(x, test)
    products = (basis * expected).sum(0).abs()
    torch.testing.assert_close(products, torch.ones(4).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("last", "step", "recomputed"),
    [(1, 11, False), (11, 21, True), (21, 31, False), (3, 20, False), (13, 23, True), (0, 2, True)],
)
def test_basis_is_recomputed_once_in_every_period(last: int, step: int, recomputed: bool) -> None:
    gradient, basis = normal(0, 12, 20), orthonormal(1, 12, 3)
    given = sight(
        gradient, "left", 3, previous=Dense("left", basis), step=step, state={"refreshed": [last]}
    )
    moved = found(CoapNudge(recompute_every=20), given)
    distance = float((moved - basis).norm())
    assert (distance > 0.2) == recomputed
    assert (gram_error(moved) < 1e-10) == recomputed  # a nudge is not orthonormalised


def test_sketch_seed_gives_all_parameters_one_gaussian_matrix() -> None:
    gradient = normal(0, 12, 20).expand(2, 12, 20)
    same = found(CoapNudge(sketch_seed=3407), sight(gradient, "left", 3))
    own = found(CoapNudge(), sight(gradient, "left", 3))
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-12)
    assert not torch.allclose(own[0], own[1])


# ---------------------------------------------------------------- one head for all


def shared_gradient(seed: int, heads: int, size: int, n: int, rank: int) -> Tensor:
    """Heads of `size` rows whose gradients lie in one row space of that rank."""
    return normal(seed, heads * size, rank) @ normal(seed + 1, rank, n)


@pytest.mark.parametrize(
    ("name", "side"),
    [("layers.0.self_attn.q_proj.weight", "right"), ("layers.0.attention.wo.weight", "left")],
)
def test_one_head_supplies_the_basis_of_heads_with_a_common_subspace(name: str, side: str) -> None:
    gradient = shared_gradient(0, 4, 8, 24, 5)
    gradient = gradient if side == "right" else gradient.mT.contiguous()
    basis = found(HeadSketch(head_dim=8), sight(gradient, side, 5, names=(name,)))
    assert gram_error(basis) < 1e-10
    assert float(captured_energy(gradient, Dense(side, basis))) > 1 - 1e-9  # type: ignore[arg-type]


def test_only_the_drawn_head_is_looked_at() -> None:
    """Heads in orthogonal subspaces: whichever is drawn is captured, the others are not."""
    frame = orthonormal(0, 24, 24)
    gradient = torch.cat([normal(i, 8, 4) @ frame[:, 4 * i : 4 * i + 4].mT for i in range(4)])
    drawn = set()
    for seed in range(12):
        given = sight(gradient, "right", 4, names=("q_proj",), seeds=[seed])
        basis = found(HeadSketch(head_dim=8), given)
        shares = [float(captured_energy(h, Dense("right", basis))) for h in gradient.split(8)]
        assert sorted(round(share, 6) for share in shares) == [0, 0, 0, 1]
        drawn.add(shares.index(max(shares)))
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("name", "side", "head_dim"),
    [
        ("layers.0.mlp.up_proj.weight", "right", 8),
        ("layers.0.self_attn.o_proj.weight", "right", 8),
        ("layers.0.self_attn.q_proj.weight", "left", 8),
        ("layers.0.self_attn.q_proj.weight", "right", 7),
        ("layers.0.self_attn.q_proj.weight", "right", 32),
        ("3", "right", 8),
    ],
)
def test_everything_else_is_sketched_whole(name: str, side: str, head_dim: int) -> None:
    gradient = normal(0, 32, 5) @ normal(1, 5, 48) + 1e-3 * normal(2, 32, 48)
    basis = found(HeadSketch(head_dim), sight(gradient, side, 5, names=(name,)))
    best = captured_energy(gradient, Dense(side, linalg.top_basis(gradient, 5, side=side)))  # type: ignore[arg-type]
    assert float(captured_energy(gradient, Dense(side, basis)) / best) > 1 - 1e-6  # type: ignore[arg-type]


def test_rank_above_the_head_takes_several_heads() -> None:
    gradient = shared_gradient(0, 4, 8, 48, 20)
    basis = found(HeadSketch(head_dim=8), sight(gradient, "right", 20, names=("q_proj",)))
    assert float(captured_energy(gradient, Dense("right", basis))) > 1 - 1e-9


@pytest.mark.parametrize("bad", [{"head_dim": 0}, {"oversampling": -1}, {"power_iterations": 0.5}])
def test_impossible_head_sketch_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        HeadSketch(**bad)
