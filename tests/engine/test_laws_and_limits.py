"""Laws of the engine's parts, and the limits in which a recipe becomes a known method."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan import linalg
from subspan.optim import Composed, Composition
from subspan.optim.parts.adafactor import Adafactor
from subspan.optim.parts.descent import SGD, AverageMomentum, Lion
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.muon import Muon
from subspan.optim.parts.normaliser import FactoredRMS
from subspan.optim.parts.output import (
    Discard,
    ErrorFeedback,
    Lift,
    NormScaled,
    RescaledGradient,
    Stateless,
)
from subspan.optim.parts.refresh import Every, OnDrift, Refresh
from subspan.optim.parts.transport import Keep, ProjectionAware, Reset, Rotate
from subspan.subspaces.finders import (
    SVD,
    RandomCoordinates,
    RandomizedSVD,
    RandomOrthogonal,
    Replay,
    SeededGaussian,
    WarmPowerIteration,
)


def gradient(step: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step), dtype=dtype)


def run(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int, zero: tuple[int, ...] = ()
) -> None:
    for step in range(1, steps + 1):
        weight.grad = gradient(step, *weight.shape, dtype=weight.dtype) * (
            0.0 if step in zero else 1.0
        )
        optimizer.step()


def fresh(*shape: int) -> nn.Parameter:
    return nn.Parameter(gradient(0, *shape).clone())


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7,), (6, 4, 3, 3)])
def test_adamw_equals_torch_adamw(shape, weight_decay):
    ours, theirs = fresh(*shape), fresh(*shape)
    run(optim.AdamW([ours], lr=0.01, weight_decay=weight_decay), ours, 6)
    run(torch.optim.AdamW([theirs], lr=0.01, weight_decay=weight_decay), theirs, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_rank_galore_in_the_identity_basis_equals_adamw(side):
    # The identity on the smaller side: rows of a wide matrix, columns of a tall one.
    shape = (12, 20) if side == "left" else (20, 12)
    ours, theirs = fresh(*shape), fresh(*shape)
    eye = Replay({0: {1: torch.eye(12, dtype=torch.float64)}})
    options = {"rank": 12, "scale": 1.0, "convention": "torch", "finder": eye, "proj_type": side}
    run(optim.GaLore([ours], lr=0.01, weight_decay=0.1, **options), ours, 6)
    run(torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1), theirs, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_full_rank_galore_with_sgd_inside_does_not_depend_on_the_basis():
    results = []
    for finder in (SVD(), RandomOrthogonal()):
        weight = fresh(8, 8)
        parts = Composition(SGD(0.9), finder=finder, rank=8, refresh=Every(2), transport=Rotate())
        run(Composed([weight], lr=0.1, composition=parts), weight, 7)
        results.append(weight.detach())
    reference = fresh(8, 8)
    run(torch.optim.SGD([reference], lr=0.1, momentum=0.9), reference, 7)
    torch.testing.assert_close(results[0], reference.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[1], reference.detach(), rtol=1e-9, atol=1e-10)


def test_residual_step_of_equal_size_turns_projected_sgd_into_sgd():
    weight, reference = fresh(8, 14), fresh(8, 14)
    parts = Composition(SGD(), finder=SVD(), rank=3, refresh=Every(2), remainder=Stateless("sgd"))
    run(Composed([weight], lr=0.1, composition=parts), weight, 5)
    run(torch.optim.SGD([reference], lr=0.1), reference, 5)
    torch.testing.assert_close(weight, reference, rtol=1e-10, atol=1e-12)


def test_muon_equals_its_formula():
    weight = fresh(10, 6)
    start, moment = weight.detach().clone(), torch.zeros(10, 6, dtype=torch.float64)
    parts = Composition(Muon())
    run(Composed([weight], lr=0.1, composition=parts), weight, 3)
    for step in range(1, 4):
        g = gradient(step, 10, 6)
        moment = 0.95 * moment + 0.05 * g
        start -= 0.1 * (10 / 6) ** 0.5 * linalg.newton_schulz(0.05 * g + 0.95 * moment)
    torch.testing.assert_close(weight.detach(), start, rtol=1e-9, atol=1e-10)


def test_error_feedback_loses_nothing_of_a_constant_gradient():
    # With SGD inside, everything that was not applied is still in the buffer.
    weight = nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    constant = gradient(1, 8, 12)
    parts = Composition(SGD(), finder=SVD(), rank=2, refresh=Every(1), remainder=ErrorFeedback())
    optimizer = Composed([weight], lr=1.0, composition=parts)
    for _ in range(9):
        weight.grad = constant.clone()
        optimizer.step()
    torch.testing.assert_close(-weight.detach() + optimizer.state[weight]["error"], 9 * constant)


def test_storage_in_the_parameters_own_precision_changes_nothing():
    results = []
    for storage in ("parameter", "fp32", {"basis": "fp32"}):
        weight = nn.Parameter(gradient(0, 12, 20).float())
        run(optim.GaLore([weight], rank=4, update_proj_gap=3, storage=storage), weight, 7)
        results.append(weight.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bf16_storage_halves_the_state_and_stays_close():
    whole, half = (nn.Parameter(gradient(0, 48, 64).float()) for _ in range(2))
    first = optim.GaLore([whole], rank=8, finder="svd", update_proj_gap=100)
    second = optim.GaLore([half], rank=8, finder="svd", update_proj_gap=100, storage="bf16")
    run(first, whole, 20)
    run(second, half, 20)
    assert second.state_bytes()["total"] * 2 == first.state_bytes()["total"]
    moved = whole.detach() - gradient(0, 48, 64).float()
    assert (half.detach() - whole.detach()).norm() < 0.1 * moved.norm()


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scaled", [True, False])
def test_fira_without_forming_the_residual_equals_the_explicit_formula(side, scaled, orthonormal):
    m, n, r, alpha, lr = 9, 14, 3, 0.25, 0.1
    d = m if side == "left" else n
    basis = gradient(77, d, r)
    if orthonormal:
        basis = torch.linalg.qr(basis)[0]
    finder = Replay({0: {1: basis}}, like=SVD() if orthonormal else SeededGaussian())
    weight = fresh(m, n)
    parts = Composition(
        Adam((0.9, 0.999), 1e-6, "hf"),
        finder=finder,
        rank=r,
        proj_type=side,
        output=Lift(alpha),
        remainder=NormScaled(1.01, scaled),
    )
    run(Composed([weight], lr=lr, composition=parts), weight, 5)

    expected = gradient(0, m, n).clone()
    first = second = 0.0
    last = None
    axis = 0 if side == "left" else 1
    for step in range(1, 6):
        g = gradient(step, m, n)
        coordinates = basis.T @ g if side == "left" else g @ basis
        first = 0.9 * first + 0.1 * coordinates
        second = 0.999 * second + 0.001 * coordinates**2
        direction = first / (second.sqrt() + 1e-6)
        lift = (lambda c: basis @ c) if side == "left" else (lambda c: c @ basis.T)
        factor = direction.norm(dim=axis, keepdim=True) / (
            coordinates.norm(dim=axis, keepdim=True) + 1e-8
        )
        residual = (g - (alpha if scaled else 1.0) * lift(coordinates)) * factor
        norm = residual.norm()
        if last is not None:
            limit = max((norm / (last + 1e-8)).item(), 1.01) / 1.01
            residual, norm = residual / limit, norm / limit
        last = norm
        rate = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        expected -= rate * (alpha * lift(direction) + residual)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("transport", [Keep(), Rotate(), ProjectionAware()])
def test_transport_is_the_identity_when_the_basis_does_not_change(transport):
    results = []
    for gap in (1, 1000):
        weight = fresh(8, 12)
        basis = torch.linalg.qr(gradient(5, 8, 3))[0]
        finder = Replay({0: {1: basis}})
        parts = Composition(Adam(), finder=finder, rank=3, refresh=Every(gap), transport=transport)
        run(Composed([weight], lr=0.01, composition=parts), weight, 6)
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transport", [Rotate(), ProjectionAware(), Keep(), Reset()])
@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_momentum_keeps_its_meaning_over_a_refresh_where_the_transport_promises_it(transport, side):
    """The subspace is the same before and after step 4, its basis is rotated; the gradient is zero
    there."""
    bases, turned = [], []
    for size in (8, 12):
        basis = torch.linalg.qr(gradient(size, size, 3))[0]
        bases.append(basis)
        turned.append(basis @ torch.linalg.qr(gradient(size + 1, 3, 3))[0])
    pick = {"left": lambda pair: pair[0], "right": lambda pair: pair[1], "full": tuple}[side]
    finder = Replay({0: {1: pick(bases), 4: pick(turned)}})
    weight = fresh(8, 12)
    parts = Composition(
        Adam(), finder=finder, rank=3, proj_type=side, refresh=Every(3), transport=transport
    )
    optimizer = Composed([weight], lr=0.01, composition=parts)

    def lifted(pair: list[torch.Tensor]) -> torch.Tensor:
        moment = optimizer.state[weight]["exp_avg"]
        if side == "left":
            return pair[0] @ moment
        return moment @ pair[1].T if side == "right" else pair[0] @ moment @ pair[1].T

    run(optimizer, weight, 3)
    before, raw = lifted(bases), optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.zeros(8, 12, dtype=torch.float64)
    optimizer.step()
    after, raw_after = lifted(turned), optimizer.state[weight]["exp_avg"]
    if transport.moves:
        torch.testing.assert_close(after, 0.9 * before)
    elif transport.restarts:
        assert not raw_after.any()
    else:
        torch.testing.assert_close(raw_after, 0.9 * raw)


def test_projection_aware_variance_equals_the_published_expression():
    inner, age = Adam((0.9, 0.99)), 7
    change = gradient(1, 3, 3)
    first, second = gradient(2, 3, 5), gradient(3, 3, 5).square()
    state = {"exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    ProjectionAware().apply(inner, state, change, "left", age)
    c1, c2 = 1 - 0.9**age, 1 - 0.99**age
    expected = (
        c2 * (change**2 @ (second / c2 - (first / c1) ** 2) + (change @ first / c1) ** 2).abs()
    )
    torch.testing.assert_close(state["exp_avg_sq"], expected)
    torch.testing.assert_close(state["exp_avg"], change @ first)


def test_refresh_happens_at_the_published_steps():
    def steps(policy: Refresh, position: int = 0, count: int = 1) -> list[int]:
        return [t for t in range(1, 32) if policy.scheduled(t, position, count, {}) == t]

    assert steps(Every(10)) == [1, 11, 21, 31]
    assert steps(Every(10, phase=0)) == [1, 10, 20, 30]
    assert steps(Every(1)) == list(range(1, 32))
    assert steps(Refresh()) == [1]
    assert steps(Every(10, stagger=True), 3, 5) == [1, 7, 17, 27]


def test_staggered_refreshes_are_spread_evenly():
    gap, count = 20, 8
    policy = Every(gap, stagger=True)
    per_step = [
        sum(policy.scheduled(t, i, count, {}) == t for i in range(count)) for t in range(2, 102)
    ]
    assert max(per_step) == 1
    assert sum(per_step[gap:]) == (100 - gap) // gap * count


def test_drift_triggers_a_refresh_only_when_the_subspace_has_moved():
    weight = fresh(10, 16)
    parts = Composition(Adam(), finder=SVD(), rank=2, refresh=OnDrift(0.9, check_every=2))
    optimizer = Composed([weight], lr=0.01, composition=parts)
    still, moved = (gradient(s, 10, 2) @ gradient(s + 1, 2, 16) for s in (3, 30))
    for step in range(1, 12):
        weight.grad = (still if step <= 6 else moved).clone()
        optimizer.step()
        assert optimizer.state[weight]["refreshed"] == (1 if step <= 6 else 7)


def test_randomised_finder_captures_what_the_exact_one_does():
    weight = fresh(60, 90)
    optimizer = optim.GaLore([weight], rank=8, update_proj_gap=5)
    for step in range(1, 12):
        slow = torch.linalg.qr(gradient(1, 60, 12) + 0.02 * step * gradient(2, 60, 12))[0]
        weight.grad = slow * torch.logspace(0, -1.5, 12, dtype=torch.float64) @ gradient(3, 12, 90)
        weight.grad += 0.01 * gradient(100 + step, 60, 90)
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        if optimizer.state[weight]["refreshed"] == step:
            exact = torch.linalg.svdvals(weight.grad)[:8].square().sum()
            assert (basis.T @ weight.grad).square().sum() > 0.995 * exact


def test_stale_limiter_memory_does_not_throttle_after_a_zero_gradient():
    weight = fresh(8, 12)
    optimizer = optim.Fira([weight], rank=2, finder="svd", lr=0.1)
    run(optimizer, weight, 3, zero=(2,))
    assert optimizer.state[weight]["update_norm"] > 0.1


# ---------------------------------------------------------------- combinations

FINDERS = (
    SVD(),
    RandomizedSVD(),
    WarmPowerIteration(),
    RandomOrthogonal(),
    RandomCoordinates(),
    SeededGaussian(),
)
TRANSPORTS = (Keep(), Reset(), Rotate(), ProjectionAware())
INNERS = (
    Adam(),
    Adam(convention="hf"),
    SGD(),
    SGD(0.9, nesterov=True),
    Lion(),
    Adafactor(),
    Adafactor(0.9),
    Muon(),
)
ENDS = (
    (Lift(), Discard()),
    (Lift(0.5), NormScaled()),
    (Lift(), Stateless("sign", 0.1)),
    (Lift(), Stateless("sgd", 0.1, momentum_loss=0.5)),
    (Lift(), ErrorFeedback()),
    (RescaledGradient("channel"), Discard()),
    (RescaledGradient("tensor", 4.0, scale_front=True), Discard()),
)
SIDES = ("std", "reverse_std", "full", "entries")


def test_every_legal_combination_of_parts_takes_steps_and_every_other_is_refused():
    legal = refused = 0
    for finder, transport, inner, (output, remainder), side in itertools.product(
        FINDERS, TRANSPORTS, INNERS, ENDS, SIDES
    ):
        try:
            parts = Composition(
                inner,
                finder=finder,
                rank=3,
                proj_type=side,
                refresh=Every(2),
                transport=transport,
                output=output,
                remainder=remainder,
                normaliser=FactoredRMS() if legal % 7 == 0 else None,
                parameter_scale=1e-3 if legal % 5 == 0 and side != "entries" else None,
            )
        except ValueError as error:
            refused += 1
            assert len(str(error)) > 20
            continue
        legal += 1
        if legal % 4:
            continue  # all are built; one in four also runs, which keeps the suite short
        weight = nn.Parameter(gradient(0, 6, 9).float())
        bias = nn.Parameter(gradient(0, 5).float())
        optimizer = Composed([weight, bias], lr=0.01, composition=parts)
        for step in range(1, 4):
            weight.grad, bias.grad = gradient(step, 6, 9).float(), gradient(step, 5).float()
            optimizer.step()
        assert weight.isfinite().all() and bias.isfinite().all(), (
            finder,
            transport,
            inner,
            output,
            remainder,
            side,
        )
    assert legal > 1000 and refused > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"finder": RandomCoordinates(), "proj_type": "full"}, "RandomCoordinates.*full"),
        ({"finder": SVD(), "proj_type": "entries"}, "SVD.*entries"),
        ({"finder": SVD(), "proj_type": "full", "remainder": NormScaled()}, "NormScaled.*full"),
        ({"finder": WarmPowerIteration(), "inner": SGD()}, "WarmPowerIteration.*SGD"),
        (
            {"finder": SVD(), "output": RescaledGradient(), "remainder": Stateless()},
            "RescaledGradient.*Stateless",
        ),
        ({"finder": SVD(), "transport": Rotate(), "inner": Adafactor(0.9)}, "Rotate.*Adafactor"),
        ({"remainder": NormScaled()}, "NormScaled needs a finder"),
        ({"finder": SVD(), "proj_type": "up"}, "proj_type='up'"),
        ({"finder": SVD(), "rank": 0}, "rank=0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusal_names_the_two_parts_that_disagree(options, words):
    with pytest.raises(ValueError, match=words):
        Composition(**{"inner": Adam(), **options})


def test_flora_carries_its_momentum_with_the_old_and_the_new_projection():
    """Two steps over a change of projection, written out from the paper's equations."""
    m, n, r, b = 8, 12, 4, 0.9
    old, new = gradient(50, m, r) / r**0.5, gradient(51, m, r) / r**0.5
    finder = Replay({0: {1: old, 2: new}}, like=SeededGaussian())
    parts = Composition(
        AverageMomentum(b),
        finder=finder,
        rank=r,
        refresh=Every(2, phase=0),
        transport=Rotate(),
        remainder=Stateless("sgd", 1 - b, momentum_loss=b),
    )
    weight = fresh(m, n)
    run(Composed([weight], lr=1.0, composition=parts), weight, 3)
    g = [gradient(step, m, n) for step in (1, 2, 3)]
    first = (1 - b) * old.T @ g[0]
    update = (1 - b) * g[0] + (1 - b) * g[1] + b * old @ first
    second = b * new.T @ (old @ first) + (1 - b) * new.T @ g[1]
    update += (1 - b) * g[2] + b * new @ second
    torch.testing.assert_close(weight.detach(), gradient(0, m, n) - update)


def test_stored_random_basis_gives_the_same_run_as_the_regenerated_one():
    results = []
    for stored in (False, True):
        weight = nn.Parameter(gradient(0, 12, 20).float())
        optimizer = optim.APOLLO([weight], rank=4, update_proj_gap=3, store_basis=stored)
        run(optimizer, weight, 8)
        assert ("basis" in optimizer.state[weight]) == stored
        results.append(weight.detach())
    assert torch.equal(results[0], results[1])


def test_full_rank_fira_without_a_limiter_is_full_rank_galore():
    results = []
    for build, options in (
        (optim.Fira, {"alpha": 1.0, "growth_limit": None}),
        (optim.GaLore, {"scale": 1.0}),
    ):
        weight = fresh(8, 12)
        basis = torch.linalg.qr(gradient(5, 8, 8))[0]
        finder = Replay({0: {1: basis}})
        run(build([weight], lr=0.01, rank=8, finder=finder, **options), weight, 5)
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("projection", ["block", "columns", "rows", "randk"])
def test_frugal_with_density_one_is_the_inner_optimizer(projection):
    ours, theirs = fresh(8, 12), fresh(8, 12)
    options = {"density": 1.0, "update_gap": 100, "projection": projection}
    run(optim.FRUGAL([ours], lr=0.01, **options), ours, 5)
    run(torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0), theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_frugal_with_density_zero_keeps_no_state_and_takes_signs():
    weight = fresh(8, 12)
    optimizer = optim.FRUGAL([weight], lr=0.01, density=0.0)
    run(optimizer, weight, 3)
    assert optimizer.state_bytes()["total"] == 0
    expected = gradient(0, 8, 12) - 0.01 * sum(gradient(t, 8, 12).sign() for t in (1, 2, 3))
    torch.testing.assert_close(weight.detach(), expected)


def test_flora_projects_back_to_the_identity_on_average():
    drawn = [linalg.gaussian_basis(seed, 6, 4, dtype=torch.float64) for seed in range(4000)]
    mean = torch.stack([basis @ basis.T for basis in drawn]).mean(0)
    # An entry of one product has variance at most 2 / r = 0.5: 5 standard errors of 4000 draws.
    assert (mean - torch.eye(6, dtype=torch.float64)).abs().max() < 5 * (0.5 / 4000) ** 0.5
