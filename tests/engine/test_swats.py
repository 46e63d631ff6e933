"""SWATS: when it switches, to which learning rate, and what is left of its state then."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan.optim import Composed, Composition
from subspan.optim.parts import swats
from subspan.optim.parts.activity import Blocks
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.swats import WatchedAdam

SHAPES = ((3, 4), (5,))
# On a noisy quadratic a rate meets the average to within 2 % after some ten steps.
LOOSE = {"lr": 0.05, "relative_tolerance": 0.02, "weight_decay": 0.0}


def fresh(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(1.0 + torch.rand(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]


def slope(weight: torch.Tensor, step: int) -> torch.Tensor:
    """Gradient of `sum(W²)`, with noise that belongs to the step."""
    noise = torch.Generator().manual_seed(step)
    return 2.0 * weight + torch.randn(weight.shape, generator=noise, dtype=weight.dtype)


def descend(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int, start: int = 0
) -> list[int]:
    """Steps on `sum(W²)`; returns the steps after which some parameter was in the SGD phase."""
    switched = []
    for step in range(start + 1, start + steps + 1):
        for weight in weights:
            weight.grad = slope(weight.detach(), step)
        optimizer.step()
        if any("sgd_lr" in state for state in optimizer.state.values()):
            switched.append(step)
    return switched


def transcribed(
    weights: list[torch.Tensor], steps: int, lr: float, share: float, least: int
) -> tuple[list[torch.Tensor], int | None, float | None]:
    """The published algorithm on the whole network's vectors, with a relative tolerance."""
    shapes, sizes = [w.shape for w in weights], [w.numel() for w in weights]
    w = torch.cat([x.flatten() for x in weights])
    m, a, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    average, scale, switch = 0.0, None, None
    for k in range(1, steps + 1):
        parts = [part.view(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
        g = torch.cat([slope(part, k).flatten() for part in parts])
        if scale is not None:
            v = 0.9 * v + g
            w = w - 0.1 * scale * v
            continue
        m, a = 0.9 * m + 0.1 * g, 0.999 * a + 0.001 * g * g
        p = -lr * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k) * m / (a.sqrt() + 1e-8)
        w = w + p
        rate = float(p @ p / -(p @ g))
        average = 0.999 * average + 0.001 * rate
        estimate = average / (1 - 0.999**k)
        if k >= least and abs(estimate - rate) < share * abs(estimate):
            scale, switch = estimate, k
    parts = zip(w.split(sizes), shapes, strict=True)
    return [part.view(shape) for part, shape in parts], switch, scale


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("least", [2, 15])
def test_switch_of_the_whole_network_equals_the_published_algorithm(seed, groups, least):
    weights = fresh(seed)
    params = weights if groups == 1 else [{"params": [w]} for w in weights]
    optimizer = optim.SWATS(params, min_steps=least, **LOOSE)
    start = [w.detach().clone() for w in weights]
    switched = descend(optimizer, weights, 120)
    expected, step, scale = transcribed(start, 120, 0.05, 0.02, least)
    assert step is not None and switched[0] == step >= least
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), other, rtol=1e-9, atol=1e-12)
        assert optimizer.state[weight]["sgd_lr"] == pytest.approx(scale, rel=1e-12)


def test_each_tensor_can_switch_by_itself():
    weights = fresh()
    optimizer = optim.SWATS(weights, granularity="tensor", **LOOSE)
    descend(optimizer, weights, 60)
    for weight in weights:
        start = next(w for w in fresh() if w.shape == weight.shape).detach()
        _, _, scale = transcribed([start], 60, 0.05, 0.02, 2)
        assert optimizer.state[weight]["sgd_lr"] == pytest.approx(scale, rel=1e-12)
    assert len({state["sgd_lr"] for state in optimizer.state.values()}) == 2


def test_without_tolerance_it_is_adam():
    first, second = fresh(), fresh()
    assert not descend(optim.SWATS(first, switch_tolerance=0.0, weight_decay=0.1), first, 30)
    parts = Composition(Adam(convention="hf"))
    descend(Composed(second, lr=1e-3, weight_decay=0.1, composition=parts), second, 30)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_its_step_does_not_depend_on_how_weights_are_cut(transposed, nonfinite, monkeypatch):
    states, weights = [], []
    for length in (1 << 17, 5):
        monkeypatch.setitem(swats.PIECE, "cpu", length)
        start = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weight = nn.Parameter(start.T.contiguous().T if transposed else start)
        options = {"weight_decay": 0.1, "nonfinite": nonfinite, "switch_tolerance": 0.0}
        optimizer = optim.SWATS([weight], lr=0.05, **options)
        descend(optimizer, [weight], 6)
        states.append(optimizer.state[weight])
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-14, atol=0)
    assert states[0]["rate_average"] == pytest.approx(states[1]["rate_average"], rel=1e-12)
    assert states[0]["rates"] == states[1]["rates"] == 6


def test_the_switch_halves_the_state_and_the_books_agree():
    weights = fresh()
    optimizer = optim.SWATS(weights, **LOOSE)
    descend(optimizer, weights, 1)
    before = optimizer.state_bytes()
    assert before == {"first_moment": 8 * 17, "second_moment": 8 * 17, "scalar": 32, "total": 304}
    descend(optimizer, weights, 59, start=1)
    assert optimizer.state_bytes() == {"first_moment": 8 * 17, "total": 8 * 17}
    assert all(state["step"] == 60 for state in optimizer.state.values())


@pytest.mark.parametrize("stop", [1, "switch", 25])
@pytest.mark.parametrize("granularity", ["network", "tensor"])
def test_resumed_run_equals_the_uninterrupted_one_over_the_switch(stop, granularity):
    options = {"granularity": granularity, **LOOSE}
    whole = fresh()
    switched = descend(optim.SWATS(whole, **options), whole, 40)
    at = switched[0] if stop == "switch" else stop
    weights = fresh()
    begun = optim.SWATS(weights, **options)
    descend(begun, weights, at)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    resumed = optim.SWATS(copies, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    descend(resumed, copies, 40 - at, start=at)
    assert all(torch.equal(a, b) for a, b in zip(whole, copies, strict=True))


def test_a_learning_rate_drop_acts_on_both_phases():
    weights = fresh()
    optimizer = optim.SWATS(weights, **LOOSE)
    descend(optimizer, weights, 40)
    before = [w.detach().clone() for w in weights]
    moments = [optimizer.state[w]["momentum_buffer"].clone() for w in weights]
    scale = optimizer.state[weights[0]]["sgd_lr"]
    optimizer.param_groups[0]["lr"] /= 10
    descend(optimizer, weights, 1, start=40)
    for weight, old, moment in zip(weights, before, moments, strict=True):
        expected = old - 0.1 * scale / 10 * (0.9 * moment + slope(old, 41))
        torch.testing.assert_close(weight.detach(), expected)


def test_parameters_that_come_late_join_the_network():
    weights = fresh()
    optimizer = optim.SWATS(weights, **LOOSE)
    descend(optimizer, weights, 40)
    late = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": [late], "lr": 0.0})
    descend(optimizer, [*weights, late], 1)
    assert "sgd_lr" not in optimizer.state[late]  # no learning rate to be proportional to yet
    optimizer.param_groups[1]["lr"] = 0.05
    descend(optimizer, [*weights, late], 1)
    assert optimizer.state[late]["sgd_lr"] == optimizer.state[weights[0]]["sgd_lr"]
    before = late.detach().clone()
    descend(optimizer, [*weights, late], 1, start=7)
    scale = optimizer.state[late]["sgd_lr"]
    torch.testing.assert_close(late.detach(), before - 0.1 * scale * slope(before, 8))


def test_negative_rates_and_steps_without_learning_rate_never_switch():
    weights = fresh()
    optimizer = optim.SWATS(weights, lr=0.01, switch_tolerance=1e9, min_steps=3)
    for step in range(12):
        for weight in weights:
            # After one step the moment points against every gradient, and the rate is negative.
            weight.grad = torch.full_like(weight, 1.0 if step == 0 else -1e-3)
        optimizer.step()
    assert not any("sgd_lr" in state for state in optimizer.state.values())
    still = optim.SWATS(fresh(), lr=0.0, switch_tolerance=1e9)
    assert not descend(still, still.param_groups[0]["params"], 5)
    assert all(state["rates"] == 0 for state in still.state.values())


def test_update_in_the_backward_pass_goes_over_the_switch():
    results: list[list[torch.Tensor]] = []
    for attached in (False, True):
        weights = fresh()
        optimizer = optim.SWATS(weights, **LOOSE)
        if attached:
            optimizer.attach_to_backward()
        for step in range(40):
            optimizer.zero_grad()
            sum((w * slope(w.detach(), step)).sum() for w in weights).backward()
            optimizer.step()
        assert all("sgd_lr" in state for state in optimizer.state.values())
        results.append([w.detach() for w in weights])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"switch_tolerance": -1.0}, "switch_tolerance"),
        ({"relative_tolerance": float("nan")}, "relative_tolerance"),
        ({"min_steps": 1.5}, "min_steps"),
        ({"granularity": "layer"}, "granularity"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.SWATS(fresh(), **bad)


def test_an_activity_beside_it_is_refused():
    with pytest.raises(ValueError, match="Blocks"):
        Composition(WatchedAdam(), activity=Blocks(0.5, 2))
