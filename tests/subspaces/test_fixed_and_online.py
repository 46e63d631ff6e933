"""Columns of fixed matrices, how moments follow them, and bases that train themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import subspan.optim as optim
from subspan import linalg
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.transport import Rotate
from subspan.subspaces import Coordinates, finders_fixed
from subspan.subspaces.finder import Sight
from subspan.subspaces.finders_fixed import TopColumns
from subspan.subspaces.finders_online import AdamWStep, LionStep, OnlinePCA, SGDStep, pca_slope
from subspan.subspaces.fixed_columns import FixedColumns, Slots, keep_slots, shared_vectors
from subspan.subspaces.layout import Layout

DOUBLE = torch.float64
SEEDS = range(4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def choice(seed: int, size: int, rank: int, *batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(size, generator=draw)[:rank] for _ in range(math.prod(batch))]
    return torch.stack(rows).view(*batch, rank)


def sight(gradient: Tensor, side: str, rank: int, previous: Any = None, **more: Any) -> Sight:
    layout = Layout(0, "w", gradient.shape[-2:], gradient.shape[-2:], side, rank, True)
    return Sight(gradient, layout, [layout], previous, None, [0], {}, 1, **more)


# ---------------------------------------------------------------- chosen columns


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_columns_that_stay_keep_their_slot_and_newcomers_fill_the_others_in_order(
    seed: int, batch: tuple[int, ...]
) -> None:
    chosen, previous = choice(seed, 11, 6, *batch), choice(seed + 50, 11, 6, *batch)
    result = keep_slots(chosen, previous, 11)
    rows = zip(*(x.reshape(-1, 6).tolist() for x in (result, chosen, previous)), strict=True)
    for new, wanted, old in rows:
        assert sorted(new) == sorted(wanted)
        assert all(new[slot] == old[slot] for slot in range(6) if old[slot] in wanted)
        arrived = [column for column in new if column not in old]
        assert arrived == sorted(arrived)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["columns", "coordinates"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_moving_by_slots_equals_the_product_with_the_change_of_basis(
    seed: int, side: str, kind: str, batch: tuple[int, ...]
) -> None:
    vectors = shared_vectors("random", 9, 0, DOUBLE, torch.device("cpu"))

    def subspace(index: Tensor) -> Any:
        if kind == "columns":
            return FixedColumns(side, index, vectors)
        return Coordinates(side, index, 9)

    old, new = subspace(choice(seed, 9, 5, *batch)), subspace(choice(seed + 9, 9, 4, *batch))
    moment = normal(seed, *batch, *((5, 7) if side == "left" else (7, 5)))
    slots, change = new.slots_from(old), new.change_from(old).to(DOUBLE)
    assert isinstance(slots, Slots)
    expected = change @ moment if side == "left" else moment @ change.mT
    torch.testing.assert_close(slots.move(moment, side), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_finder_keeps_in_place_moves_as_the_product_with_the_change_of_basis(
    seed: int, side: str
) -> None:
    finder, shape = TopColumns("dct3"), (9, 7) if side == "left" else (7, 9)
    old = finder.find(sight(normal(seed, *shape), side, 5))
    new = finder.find(sight(normal(seed + 9, *shape), side, 5, old))
    moment = normal(seed, *((5, 7) if side == "left" else (7, 5)))
    slots, change = new.slots_from(old), new.change_from(old).to(DOUBLE)
    assert isinstance(slots, Slots) and slots.source is None
    expected = change @ moment if side == "left" else moment @ change.mT
    assert torch.equal(slots.move(moment, side), expected)


@pytest.mark.parametrize("kind", ["dct2", "dct3", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_wide_transforms_choose_and_hand_over_what_the_products_do(
    kind: Any, side: Any, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspan.subspaces.finders_fixed._SMALL_WIDTH", 4)
    monkeypatch.setitem(finders_fixed._BLOCK, "cpu", 40)  # several blocks
    gradient = normal(3, *batch, *((12, 17) if side == "left" else (17, 12)))
    finder = TopColumns(kind, seed=3)
    found = finder.find(sight(gradient, side, 5))
    rows = finder.vectors(side, 12, DOUBLE, torch.device("cpu"))
    whole = rows @ gradient if side == "left" else gradient @ rows.mT
    across = -1 if side == "left" else -2
    expected = whole.abs().sum(across).topk(5).indices.sort().values
    assert torch.equal(found.index, expected)
    basis = found.dense()
    product = basis.mT @ gradient if side == "left" else gradient @ basis
    torch.testing.assert_close(found.project(gradient), product)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rotated_moments_of_newcomers_are_exactly_zero(side: str) -> None:
    old, new = torch.tensor([4, 1, 6]), torch.tensor([4, 2, 1])
    shape = (3, 5) if side == "left" else (5, 3)
    state = {"exp_avg": normal(0, *shape), "exp_avg_sq": normal(1, *shape).square()}
    before = {name: value.clone() for name, value in state.items()}
    Rotate().apply(Adam(), state, Slots.between(new, old, 9), side, 1)
    for name, moment in state.items():
        rows, past = (m if side == "left" else m.T for m in (moment, before[name]))
        assert torch.equal(rows[0], past[0])
        assert torch.equal(rows[1], torch.zeros(5, dtype=DOUBLE))
        assert torch.equal(rows[2], past[1])


@pytest.mark.parametrize("kind", ["dct2", "dct3", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_fixed_columns_are_those_of_the_orthogonal_matrix(kind: Any, side: Any) -> None:
    vectors = shared_vectors(kind, 12, 3, DOUBLE, torch.device("cpu"))
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(12, dtype=DOUBLE))
    index = choice(1, 12, 5, 2)
    subspace = FixedColumns(side, index, vectors)
    assert (subspace.size, subspace.rank, subspace.orthonormal) == (12, 5, True)
    if kind != "random":
        full = linalg.dct_basis(12, inverse=kind == "dct3", dtype=DOUBLE)
        expected = torch.stack([full[:, row] for row in index])
        torch.testing.assert_close(subspace.dense(), expected, rtol=1e-12, atol=1e-13)
    x = normal(4, 2, *((12, 7) if side == "left" else (7, 12)))
    basis = subspace.dense()
    product = basis.mT @ x if side == "left" else x @ basis
    torch.testing.assert_close(subspace.project(x), product, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(subspace.project(subspace.lift(product)), product)


def test_known_coordinates_are_used_for_that_matrix_only() -> None:
    vectors = shared_vectors("dct3", 6, 0, DOUBLE, torch.device("cpu"))
    x, marked = normal(0, 6, 4), normal(1, 2, 4)
    subspace = FixedColumns("left", torch.tensor([3, 0]), vectors, (x, marked))
    assert torch.equal(subspace.project(x), marked)
    assert torch.equal(subspace.project(x, out=torch.empty_like(marked)), marked)
    assert not torch.equal(subspace.project(x.clone()), marked)


def test_index_of_another_dtype_is_refused() -> None:
    vectors = shared_vectors("dct3", 6, 0, DOUBLE, torch.device("cpu"))
    with pytest.raises(TypeError, match="int64"):
        FixedColumns("left", torch.tensor([1], dtype=torch.int32), vectors)


# ---------------------------------------------------------------- choosing them


@pytest.mark.parametrize("width", [12, 400])
@pytest.mark.parametrize("kind", ["dct2", "dct3", "random", "identity"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", [1, 2])
def test_chosen_columns_have_the_largest_norms(kind: Any, width: int, side: Any, norm: int) -> None:
    """On both sides of the width at which the transform becomes an FFT."""
    finder = TopColumns(kind, norm)
    gradient = normal(width, 2, *((width, 9) if side == "left" else (9, width)))
    found = finder.find(sight(gradient, side, 5))
    assert finder.form == ("coordinates" if kind == "identity" else "columns")
    full = torch.eye(width, dtype=DOUBLE)
    if kind == "random":
        full = shared_vectors("random", width, 0, DOUBLE, torch.device("cpu")).T
    elif kind != "identity":
        full = linalg.dct_basis(width, inverse=kind == "dct3", dtype=DOUBLE)
    transformed = full.T @ gradient if side == "left" else (gradient @ full).mT
    weights = (transformed.abs() ** norm).sum(-1)
    expected = weights.sort(descending=True).indices[..., :5].sort().values
    assert torch.equal(found.index, expected)
    basis = torch.stack([full[:, row] for row in expected])
    product = basis.mT @ gradient if side == "left" else gradient @ basis
    torch.testing.assert_close(found.project(gradient), product, rtol=1e-9, atol=1e-10)


def test_a_gradient_made_of_few_cosines_is_caught_whole() -> None:
    for seed in SEEDS:
        index = choice(seed, 30, 4)
        gradient = linalg.dct_basis(30, index, inverse=True, dtype=DOUBLE) @ normal(seed, 4, 8)
        found = TopColumns().find(sight(gradient, "left", 4))
        assert found.index.tolist() == sorted(index.tolist())
        assert found.residual(gradient).norm() < 1e-12 * gradient.norm()


def test_largest_entries_are_found() -> None:
    gradient = normal(0, 2, 5, 6)
    layout = Layout(0, "w", (5, 6), (5, 6), "entries", 7, True)
    found = TopColumns("identity").find(Sight(gradient, layout, [layout], None, None, [0], {}, 1))
    kept = found.lift(found.project(gradient))
    for matrix, rest in zip(gradient, gradient - kept, strict=True):
        assert (rest == 0).sum() == 7
        assert rest.abs().max() <= matrix.abs()[rest == 0].min()


def test_silent_matrices_of_a_stack_keep_their_columns() -> None:
    finder = TopColumns()
    first = finder.find(sight(normal(0, 3, 10, 6), "left", 4))
    gradient = normal(1, 3, 10, 6)
    gradient[1] = 0.0
    second = finder.find(sight(gradient, "left", 4, first))
    assert torch.equal(second.index[1], first.index[1])
    assert not torch.equal(second.index[0], first.index[0])


def test_all_layers_of_a_width_share_one_matrix_and_store_indices_only() -> None:
    weights = [torch.nn.Parameter(torch.zeros(16, n)) for n in (20, 24, 30)]
    optimizer = optim.build("dct_adamw", weights, rank=4, error_feedback=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state_bytes()["basis"] == 3 * 4 * 4
    finder = optimizer.composition(0).finder
    assert finder is not None
    unpacked = [
        finder.unpack(
            optimizer.state[w], optimizer.layout_of(w), torch.float32, torch.device("cpu")
        )
        for w in weights
    ]
    assert len({subspace.vectors.data_ptr() for subspace in unpacked}) == 1


def test_zero_gradient_at_a_choice_of_columns_puts_it_off() -> None:
    """Columns chosen from a zero gradient would be in force for a whole gap."""
    signal = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    chosen = []
    for first in (torch.zeros(24, 24), signal):
        weight = torch.nn.Parameter(torch.zeros(24, 24))
        optimizer = optim.build("dct_adamw", [weight], rank=4, update_proj_gap=100)
        for gradient in (first, signal):
            weight.grad = gradient.clone()
            optimizer.step()
        chosen.append(sorted(optimizer.state[weight]["index"].tolist()))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    "bad",
    [{"matrix": "dct4"}, {"norm": 3}, {"left": "dct4"}, {"matrix": "identity", "left": "dct2"}],
    ids=str,
)
def test_impossible_choices_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"matrix|norm|left"):
        TopColumns(**bad)


# ---------------------------------------------------------------- online PCA


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_slope_equals_automatic_differentiation_of_the_loss(
    seed: int, side: Any, penalty: float, batch: tuple[int, ...]
) -> None:
    gradient, basis = 5.0 * normal(seed, *batch, 9, 13), normal(seed + 20, *batch, 9, 4)
    if side == "right":
        gradient = gradient.mT
    moving = basis.clone().requires_grad_()
    x = gradient if side == "left" else gradient.mT
    unit = x / x.norm(dim=(-2, -1), keepdim=True)
    loss = (moving @ moving.mT @ unit - unit).square().sum()
    loss = loss + penalty * (moving.mT @ moving - torch.eye(4, dtype=DOUBLE)).square().sum()
    (expected,) = torch.autograd.grad(loss, moving)
    coordinates = basis.mT @ gradient if side == "left" else gradient @ basis
    slope = pca_slope(basis, gradient, coordinates, side, penalty)
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-11)


def test_slope_takes_one_product_with_the_gradient() -> None:
    m, n, r = 256, 512, 8
    basis, gradient = torch.randn(m, r), torch.randn(m, n)
    coordinates = basis.T @ gradient
    with FlopCounterMode(display=False) as counter:
        pca_slope(basis, gradient, coordinates, "left")
    assert counter.get_total_flops() <= 2 * m * n * r + 8 * m * r * r


def test_zero_gradient_has_no_pca_loss() -> None:
    basis, zero = normal(0, 6, 2), torch.zeros(2, 6, 5, dtype=DOUBLE)
    zero[1] = normal(1, 6, 5)
    slope = pca_slope(basis.expand(2, 6, 2), zero, basis.mT @ zero, "left")
    assert torch.equal(slope[0], torch.zeros(6, 2, dtype=DOUBLE))
    assert slope[1].norm() > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leading_subspace_is_at_rest_and_a_turned_one_returns(seed: int) -> None:
    left, right = (torch.linalg.qr(normal(seed + s, d, 6))[0] for s, d in ((0, 12), (9, 16)))
    gradient = left * torch.tensor([9.0, 8, 7, 1, 0.5, 0.2], dtype=DOUBLE) @ right.T
    leading = left[:, :3]
    slope = pca_slope(leading, gradient, leading.T @ gradient, "left")
    assert slope.norm() < 1e-12
    basis = torch.linalg.qr(leading + 0.3 * normal(seed + 30, 12, 3))[0]
    for _ in range(400):
        slope = pca_slope(basis, gradient, basis.T @ gradient, "left")
        SGDStep().step(basis, slope, {}, 1.0, 0.2)
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "sgd"])
def test_bases_that_started_at_different_steps_move_in_one_bucket_as_alone(optimizer: str) -> None:
    """The second weight's first gradient is zero, so its basis is a step younger."""

    def run(count: int, silent: int) -> Tensor:
        weights = [torch.nn.Parameter(torch.zeros(8, 12, dtype=DOUBLE)) for _ in range(count)]
        made = optim.build(
            "online_subspace_descent",
            weights,
            rank=3,
            projection_optimizer=optimizer,
            projection_lr=0.1,
        )
        for step in range(6):
            for number, weight in enumerate(weights):
                place = number + silent + 1 - count
                weight.grad = normal(10 * step + place, 8, 12) * (place != 1 or step > 0)
            made.step()
        return made.state[weights[-1]]["basis"]

    together, alone = run(2, 1), run(1, 1)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", [AdamWStep(), LionStep(), SGDStep()])
def test_first_gradient_gives_the_basis_and_does_not_move_it(rule: Any) -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 12))
    finder = OnlinePCA(rule, lr=0.1)
    optimizer = optim.build("online_subspace_descent", [weight], rank=3, finder=finder)
    gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient
    optimizer.step()
    basis = optimizer.state[weight]["basis"].clone()
    leading = torch.linalg.svd(gradient)[0][:, :3]
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T, rtol=0, atol=1e-5)
    weight.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    assert not torch.equal(basis, optimizer.state[weight]["basis"])


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"penalty": math.nan}, {"lr": math.inf}], ids=str)
def test_impossible_numbers_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        OnlinePCA(**bad)
