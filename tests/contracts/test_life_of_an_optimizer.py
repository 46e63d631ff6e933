"""What users of torch.optim expect of any optimizer, for every registered recipe."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from problem import GAP, Problem, options_for, same, snapshot
from torch import nn

import subspan.optim as optim

# Before the first refresh, on the step before one, on one, and right after one.
STOPS = (1, GAP - 1, GAP, GAP + 1, 2 * GAP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", STOPS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, stop, dtype):
    whole = Problem(method, dtype)
    whole.run(range(3 * GAP))
    begun = Problem(method, dtype)
    begun.run(range(stop))
    file = io.BytesIO()
    torch.save({"model": begun.model.state_dict(), "optimizer": begun.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Problem(method, dtype, seed=1)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.run(range(stop, 3 * GAP))
    assert same(whole.weights(), resumed.weights())
    assert same(snapshot(whole.optimizer), snapshot(resumed.optimizer))


def test_checkpoint_shares_no_memory_with_either_optimizer(problem):
    one, other = problem(), problem()
    one.run(range(GAP))
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    before = snapshot(one.optimizer)
    other.run(range(GAP, 2 * GAP))
    assert same(before, snapshot(one.optimizer))


def test_deep_copy_and_pickle_continue_like_the_original(problem):
    original = problem()
    original.run(range(GAP))
    for duplicate in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        duplicate.run(range(GAP, 2 * GAP))
        reference = copy.deepcopy(original)
        reference.run(range(GAP, 2 * GAP))
        assert same(reference.weights(), duplicate.weights())


def test_same_seed_gives_the_same_run(problem):
    first, second = problem(), problem()
    first.run(range(2 * GAP))
    torch.manual_seed(123)  # the global generator must not matter
    second.run(range(2 * GAP))
    assert same(first.weights(), second.weights())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, [lambda step: 1 / (1 + step)] * len(o.param_groups)
        ),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.01, total_steps=20, cycle_momentum="betas" in o.param_groups[0]
        ),
    ],
)
def test_schedulers_drive_the_step_size(problem, scheduler):
    run = problem()
    plan = scheduler(run.optimizer)
    for step in range(2 * GAP):
        run.run([step])
        plan.step()
    before = run.weights()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.run([99])
    assert same(before, run.weights())


def test_each_group_has_its_own_learning_rate(problem):
    run = problem(exclude="wide")
    still, moving = run.optimizer.param_groups[0], run.optimizer.param_groups[1]
    still["lr"] = 0.0
    before = [[p.detach().clone() for p in group["params"]] for group in (still, moving)]
    run.run(range(GAP))
    assert same(before[0], still["params"])
    assert not any(torch.equal(a, b) for a, b in zip(before[1], moving["params"], strict=True))


def test_group_added_in_the_middle_of_a_run_is_trained(problem):
    run = problem()
    run.run(range(GAP))
    late = nn.Linear(24, 24, bias=False)
    run.optimizer.add_param_group({"params": list(late.named_parameters())})
    before = late.weight.detach().clone()
    late(torch.ones(2, 24)).square().sum().backward()
    run.run([])
    run.optimizer.step()
    assert not torch.equal(before, late.weight)
    assert run.optimizer.state[late.weight]["step"] == 1


def test_closure_is_called_with_gradients_enabled(problem):
    run = problem()

    def closure():
        run.optimizer.zero_grad()
        loss = run.loss(0)
        loss.backward()
        return loss

    before = run.weights()
    loss = run.optimizer.step(closure)
    assert loss.item() > 0
    assert not same(before, run.weights())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_both_forms(problem, set_to_none):
    run = problem()
    for step in range(GAP + 1):
        run.optimizer.zero_grad(set_to_none=set_to_none)
        run.loss(step).backward()
        run.optimizer.step()
    reference = problem()
    reference.run(range(GAP + 1))
    assert same(reference.weights(), run.weights())


def test_gradients_are_left_as_they_were(problem):
    run, compared = problem(), 0
    for step in range(GAP + 1):
        run.backward(step)
        before = {p: p.grad.clone() for p in run.model.parameters() if p.grad is not None}
        run.optimizer.step()
        kept = [p for p in before if p.requires_grad]  # others need none in the next step
        assert same([before[p] for p in kept], [p.grad for p in kept])
        compared += len(kept)
    assert compared


def test_accumulated_gradients_equal_the_large_batch(problem):
    large, small = problem(dtype=torch.float64), problem(dtype=torch.float64)
    for step in range(GAP + 1):
        large.optimizer.zero_grad()
        ((large.loss(step) + large.loss(step + 1)) / 2).backward()
        large.optimizer.step()
        small.optimizer.zero_grad()
        (small.loss(step) / 2).backward()
        (small.loss(step + 1) / 2).backward()
        small.optimizer.step()
    # A sign or a direction chosen on a tie may differ in single entries, so the bulk is compared.
    for a, b in zip(large.weights(), small.weights(), strict=True):
        assert (a - b).abs().median() < 1e-9


def test_parameter_without_gradient_is_left_alone(problem):
    run = problem()
    before = run.model.second.weight.detach().clone()
    for step in range(GAP + 1):
        run.backward(step)
        run.model.second.weight.grad = None
        run.optimizer.step()
    assert torch.equal(before, run.model.second.weight)
    assert "exp_avg" not in run.optimizer.state.get(run.model.second.weight, {})


def test_late_parameter_starts_with_its_own_step_count(method):
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    moved = []
    for wait in (0, 1):
        early, late = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
        options = options_for(method)
        if "density" in optim.methods()[method].defaults:
            options["density"] = 1.0  # every tensor active: the change must come from the same rule
        optimizer = optim.build(method, [early, late], **options)
        for step in range(wait + 1):
            early.grad = gradient.clone()
            late.grad = gradient.clone() if step == wait else None
            optimizer.step()
        moved.append(late.detach() - weight)
    torch.testing.assert_close(moved[0], moved[1])


def test_compiled_model_trains_the_same(problem):
    plain, compiled = problem(), problem()
    eager = compiled.model
    compiled.model = torch.compile(eager, backend="eager")
    plain.run(range(GAP + 1))
    compiled.run(range(GAP + 1))
    assert same(plain.weights(), [p.detach() for p in eager.parameters()])


def test_names_of_a_compiled_model_are_understood(method):
    model = torch.compile(Problem(method).model, backend="eager")
    optimizer = optim.build(method, model.named_parameters(), **options_for(method))
    if optimizer.composition(0).takes_all:
        return  # names decide about blocks, not about what is left out
    kept = [
        optimizer.layout_of(p)
        for name, p in model.named_parameters()
        if "embed" in name or "head" in name
    ]
    assert not any(layout.projected for layout in kept)


def test_training_lowers_the_loss(problem):
    run = problem(lr=1e-2)
    with torch.no_grad():
        before = sum(run.loss(step).item() for step in range(8))
    run.run(range(60))
    with torch.no_grad():
        after = sum(run.loss(step).item() for step in range(8))
    assert after < 0.9 * before


def test_learning_rate_may_be_a_tensor(problem):
    number, tensor = problem(lr=0.01), problem(lr=torch.tensor(0.01, dtype=torch.float64))
    number.run(range(GAP))
    tensor.run(range(GAP))
    assert same(number.weights(), tensor.weights())


def test_weight_decay_alone_shrinks_by_lr_times_decay(method):
    options = options_for(method, lr=0.1, weight_decay=0.5)
    if "scale_parameter" in optim.methods()[method].defaults:
        options["scale_parameter"] = False
    weight = nn.Parameter(torch.randn(12, 20))
    before = weight.detach().clone()
    optimizer = optim.build(method, [weight], **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))
