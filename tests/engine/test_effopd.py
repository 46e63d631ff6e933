"""EffOPD: its ladder of candidates in closed form, and its life as an optimizer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan.layers import QuantisedWeight
from subspan.optim.effopd import EffOPD


class Wall:
    """Score that rises with |w| up to a limit and falls to nothing behind it."""

    def __init__(self, weight: torch.Tensor, limit: float) -> None:
        self.weight, self.limit, self.seen = weight, limit, []

    def __call__(self) -> float:
        assert not torch.is_grad_enabled()
        value = float(self.weight.abs().max())
        self.seen.append(value)
        return value if value <= self.limit else -1.0


def moving(limit: float, **options: float) -> tuple[nn.Parameter, EffOPD, Wall]:
    """A weight that every step moves by 1 from 0."""
    weight = nn.Parameter(torch.zeros(2, 3))
    score = Wall(weight, limit)
    return weight, EffOPD(torch.optim.SGD([weight], lr=1.0), score, **options), score


def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    weight.grad = -torch.ones_like(weight)
    optimizer.step()


def test_candidates_are_odd_multiples_of_the_displacement():
    weight, optimizer, score = moving(limit=100.0)
    step(weight, optimizer)
    assert score.seen == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert torch.equal(weight.detach(), torch.full((2, 3), 11.0))
    assert optimizer.history == [(1, 5, 11.0)]


@pytest.mark.parametrize(("limit", "accepted"), [(0.0, 0), (2.9, 0), (3.0, 1), (8.0, 3), (11.0, 5)])
def test_the_last_candidate_before_a_fall_stays(limit, accepted):
    weight, optimizer, _ = moving(limit)
    step(weight, optimizer)
    assert torch.equal(weight.detach(), torch.full((2, 3), 1.0 + 2.0 * accepted))
    assert optimizer.history[0][1] == accepted


def test_displacements_count_from_the_accepted_weights_of_the_last_power_of_two():
    weight, optimizer, score = moving(limit=8.0)
    positions = []
    for _ in range(8):
        step(weight, optimizer)
        positions.append(weight[0, 0].item())
    assert positions == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0]
    assert [entry[0] for entry in optimizer.history] == [1, 2, 4, 8]
    # Step 1 goes on to 7; from there on the limit is reached, and each time one candidate at twice
    # the way since the last power of two is tried in vain.
    assert score.seen == [1.0, 3.0, 5.0, 7.0, 9.0, 8.0, 10.0, 10.0, 14.0, 14.0, 22.0]


def test_a_tie_and_a_nan_are_rejections():
    for values in ([1.0, 1.0], [1.0, float("nan")], [float("nan"), 5.0]):
        weight = nn.Parameter(torch.zeros(2, 2))
        answers = iter(values)
        optimizer = EffOPD(torch.optim.SGD([weight], lr=1.0), lambda a=answers: next(a))
        step(weight, optimizer)
        assert torch.equal(weight.detach(), torch.ones(2, 2))
        assert optimizer.history[0][1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rejection_restores_every_bit(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(5, 7, generator=generator).to(dtype)
    gradient = torch.randn(5, 7, generator=generator).to(dtype)
    for accepted in range(3):
        plain, wrapped = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        calls = iter([*range(accepted + 1), -1])
        optimizer = EffOPD(torch.optim.SGD([wrapped], lr=0.1), lambda c=calls: float(next(c)))
        for weight, one in ((plain, torch.optim.SGD([plain], lr=0.1)), (wrapped, optimizer)):
            weight.grad = gradient.clone()
            one.step()
        moved = plain.detach().float()
        expected = moved + (moved - start.float()) * (2.0 * accepted)
        assert torch.equal(wrapped.detach(), expected.to(dtype) if accepted else plain.detach())


def test_other_lengths_and_fewer_attempts():
    weight, optimizer, score = moving(limit=100.0, alpha=0.5, attempts=2)
    step(weight, optimizer)
    assert score.seen == [1.0, 1.5, 2.0]


def test_embeddings_heads_norms_and_vectors_stay_where_the_optimizer_put_them():
    names = ("embed_tokens.weight", "layers.0.mlp.weight", "lm_head.weight", "layers.0.norm.weight",
             "layers.0.mlp.bias")  # fmt: skip
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in names[:4]] + [nn.Parameter(torch.zeros(2))]
    named = list(zip(names, weights, strict=True))
    calls = iter(range(6))
    optimizer = EffOPD(torch.optim.SGD(named, lr=1.0), lambda: float(next(calls)))
    for weight in weights:
        weight.grad = -torch.ones_like(weight)
    optimizer.step()
    moved = [name for name, weight in named if weight.flatten()[0].item() != 1.0]
    assert moved == ["layers.0.mlp.weight"]


def test_given_parameters_are_extrapolated_whatever_their_name():
    head, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))
    calls = iter(range(6))
    base = torch.optim.SGD([("head.bias", head), ("mlp.weight", other)], lr=1.0)
    optimizer = EffOPD(base, lambda: float(next(calls)), parameters=[head])
    for weight in (head, other):
        weight.grad = -torch.ones_like(weight)
    optimizer.step()
    assert head[0].item() == 11.0
    assert other[0, 0].item() == 1.0


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        weight.grad = (weight.detach() - 3.0) + 0.1 * torch.randn(4, 6, generator=generator)
        optimizer.step()


def problem(method: str) -> tuple[nn.Parameter, EffOPD]:
    weight = nn.Parameter(torch.zeros(4, 6))
    inner = optim.build(method, [weight], lr=0.05, weight_decay=0.0)
    return weight, EffOPD(inner, lambda: -float((weight - 3.0).square().sum()))


@pytest.mark.parametrize("method", ["adamw", "galore"])
@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_resumed_run_equals_the_uninterrupted_one(method, stop):
    whole_weight, whole = problem(method)
    run(whole, whole_weight, range(10))
    weight, begun = problem(method)
    run(begun, weight, range(stop))
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": begun.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    weight, resumed = problem(method)
    with torch.no_grad():
        weight.copy_(saved["weight"])
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, weight, range(stop, 10))
    assert torch.equal(weight, whole_weight)
    assert resumed.history == whole.history


def test_extrapolation_reaches_a_minimum_in_fewer_steps():
    plain = nn.Parameter(torch.zeros(4, 6))
    run(optim.build("adamw", [plain], lr=0.05, weight_decay=0.0), plain, range(16))
    weight, optimizer = problem("adamw")
    run(optimizer, weight, range(16))
    assert (weight - 3.0).norm() < 0.2 * (plain - 3.0).norm()


def test_schedulers_and_closures_work_through_the_wrapper():
    weight, optimizer = problem("adamw")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight - 3.0).square().sum()
        loss.backward()
        return loss

    before = optimizer.step(closure)
    scheduler.step()
    assert before.item() == 216.0
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.025
    duplicate = copy.deepcopy(optimizer)
    duplicate.step()
    assert (duplicate.steps, optimizer.steps) == (2, 1)


def test_late_group_is_extrapolated_from_where_it_joins():
    weight, optimizer, _ = moving(limit=100.0)
    late = nn.Parameter(torch.full((2, 2), 5.0))
    optimizer.add_param_group({"params": [late]})
    late.grad = -torch.ones_like(late)
    step(weight, optimizer)
    assert torch.equal(late.detach(), torch.full((2, 2), 16.0))


def test_step_hooks_reach_the_wrapped_optimizer():
    weight, optimizer, _ = moving(limit=0.0)
    seen = []
    optimizer.register_step_post_hook(lambda inner, args, kwargs: seen.append(inner))
    step(weight, optimizer)
    assert seen == [optimizer.optimizer]


def test_impossible_settings_are_refused():
    weight = nn.Parameter(torch.zeros(2, 2))
    sgd = torch.optim.SGD([weight], lr=1.0)
    for bad in ({"alpha": 0.0}, {"alpha": float("nan")}, {"attempts": 0}, {"attempts": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EffOPD(sgd, lambda: 0.0, **bad)
    with pytest.raises(ValueError, match="parameters="):
        EffOPD(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0), lambda: 0.0)
    with pytest.raises(ValueError, match="int8"):
        held = nn.Parameter(QuantisedWeight.from_float(torch.randn(4, 256)), requires_grad=False)
        EffOPD(sgd, lambda: 0.0, parameters=[held])


def test_checkpoint_of_other_weights_is_refused_and_changes_nothing():
    _, optimizer, _ = moving(limit=0.0)
    other = EffOPD(torch.optim.SGD([nn.Parameter(torch.zeros(3, 3))], lr=0.5), lambda: 0.0)
    with pytest.raises(ValueError, match="shapes"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="without EffOPD"):
        optimizer.load_state_dict(other.optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1.0
