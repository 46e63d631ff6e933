"""Options, checkpoints and what a state holds, for every registered recipe."""

from __future__ import annotations

import copy

import pytest
import torch
from problem import GAP, Problem, options_for, same, snapshot
from torch import nn

import subspan.optim as optim
from subspan.optim.parts.refresh import Every, Lazy


def test_empty_group_is_accepted_and_empty_optimizer_refused(method):
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = optim.build(method, [{"params": []}, {"params": [weight]}], **options_for(method))
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    with pytest.raises(ValueError, match="empty"):
        optim.build(method, [], **options_for(method))


def test_misspelt_option_is_refused_with_the_nearest_one(method):
    with pytest.raises(TypeError, match=r"wieght_decay.*did you mean 'weight_decay'"):
        optim.build(method, [nn.Parameter(torch.ones(2, 2))], wieght_decay=0.1)
    with pytest.raises(TypeError, match="has no option 'learning'"):
        optim.build(method, [{"params": [nn.Parameter(torch.ones(2, 2))], "learning": 0.1}])


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"weight_decay": -0.1},
        {"nonfinite": "hope"},
        {"storage": "int3"},
        {"seed": -1},
    ],
    ids=str,
)
def test_impossible_value_is_refused_at_construction(method, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        optim.build(method, [nn.Parameter(torch.ones(2, 2))], **options_for(method, **bad))


def test_refused_group_leaves_the_optimizer_as_it_was(problem):
    run = problem()
    groups = len(run.optimizer.param_groups)
    with pytest.raises(ValueError, match="weight_decay"):
        run.optimizer.add_param_group(
            {"params": [("late", nn.Parameter(torch.ones(3, 3)))], "weight_decay": -1.0}
        )
    assert len(run.optimizer.param_groups) == groups
    run.run(range(2))


def test_checkpoint_of_another_method_is_refused_and_changes_nothing(method):
    other = next(name for name in sorted(optim.methods()) if name != method)
    source, target = Problem(other), Problem(method)
    source.run(range(2))
    target.run(range(2))
    state, groups = snapshot(target.optimizer), copy.deepcopy(target.optimizer.param_groups)
    with pytest.raises(ValueError, match=f"written by method '{other}'"):
        target.optimizer.load_state_dict(source.optimizer.state_dict())
    assert same(state, snapshot(target.optimizer))
    assert [g["lr"] for g in groups] == [g["lr"] for g in target.optimizer.param_groups]


def test_checkpoint_of_another_rank_is_refused(method):
    if not optim.methods()[method].defaults.get("rank"):
        return
    source, target = Problem(method, rank=3), Problem(method, rank=2)
    source.run(range(2))
    state = snapshot(target.optimizer)
    with pytest.raises(ValueError, match=r"rank"):
        target.optimizer.load_state_dict(source.optimizer.state_dict())
    assert same(state, snapshot(target.optimizer))
    assert target.optimizer.param_groups[0]["rank"] == 2


def test_rank_cannot_change_in_the_middle_of_a_run(method):
    if not optim.methods()[method].defaults.get("rank"):
        return
    run = Problem(method, rank=3)
    run.run(range(2))
    run.optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(ValueError, match="rank from 3 to 2"):
        run.run([2])


def test_gap_changed_in_the_middle_of_a_run_takes_effect(method):
    gap = next(
        (n for n in ("update_proj_gap", "kappa") if n in optim.methods()[method].defaults), None
    )
    if gap is None:
        return
    run = Problem(method, **{gap: 1000})
    run.run(range(3))
    weight = run.model.first.weight
    if not isinstance(run.optimizer.parts_of(weight).refresh, (Every, Lazy)):
        return  # the gap is no time between refreshes
    assert run.optimizer.state[weight]["refreshed"] == 1
    run.optimizer.param_groups[0][gap] = 1
    run.run([3])
    assert run.optimizer.state[weight]["refreshed"] == 4


def test_float32_checkpoint_loads_into_a_bf16_model(method):
    source, target = Problem(method), Problem(method, torch.bfloat16)
    source.run(range(GAP))
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    target.run(range(GAP, 2 * GAP))
    assert all(weight.isfinite().all() for weight in target.weights())


def test_state_holds_exactly_its_own_bytes(problem):
    run = problem()
    run.run(range(GAP + 1))
    storages = {}
    for state in run.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert sum(storages.values()) == run.optimizer.state_bytes()["total"]


def test_state_is_plain_tensors_and_numbers(problem):
    run = problem()
    run.run(range(GAP + 1))
    for state in run.optimizer.state_dict()["state"].values():
        flat = [x for v in state.values() for x in (v if isinstance(v, list) else [v])]
        assert all(type(value) in (torch.Tensor, int, float) for value in flat)


def test_summary_lists_every_parameter_and_its_bytes(problem):
    run = problem()
    text = run.optimizer.summary()
    assert all(name in text for name, _ in run.model.named_parameters())


def test_projection_depends_on_the_seed_and_differs_between_equal_parameters(method):
    """Of recipes with random bases; the others have no seed to depend on."""

    def bases(seed: int) -> list[torch.Tensor]:
        weights = [nn.Parameter(torch.ones(12, 16)) for _ in range(2)]
        optimizer = optim.build(method, weights, **options_for(method, seed=seed))
        for weight in weights:
            weight.grad = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        finder = optimizer.composition(0).finder
        if finder is None or finder.reads_gradient:
            return []
        found = []
        for weight in weights:
            state = {
                name: value if isinstance(value, torch.Tensor) else [value]
                for name, value in optimizer.state[weight].items()
            }
            subspace = finder.unpack(
                state, optimizer.layout_of(weight), torch.float32, weight.device
            )
            found.append(subspace.dense())
        return found

    here, elsewhere = bases(0), bases(7)
    if here:
        assert not torch.equal(here[0], here[1])
        assert not torch.equal(here[0], elsewhere[0])


def test_one_optimizer_per_parameter_in_a_backward_hook(method):
    """The layer-wise recipe by hand: gradients are freed as soon as they are used."""
    run = Problem(method)
    before = run.weights()
    for number, parameter in enumerate(run.model.parameters()):
        own = optim.build(method, [parameter], **options_for(method, seed=number))

        def hook(p: torch.Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(hook)
    for step in range(GAP + 1):
        run.loss(step).backward()
    assert all(parameter.grad is None for parameter in run.model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, run.weights(), strict=True)]
    assert all(moved)


def test_compiled_step_equals_the_eager_one(method):
    eager, compiled = Problem(method), Problem(method)
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for number in range(GAP + 1):
        eager.run([number])
        compiled.backward(number)
        step()
    assert same(eager.weights(), compiled.weights())
    torch.compiler.reset()


def test_scale_changed_in_the_middle_of_a_run_takes_effect(method):
    defaults = optim.methods()[method].defaults
    name = next((n for n in ("scale", "alpha", "proj_params_lr_scale") if n in defaults), None)
    if name is None:
        return
    changed, kept = Problem(method), Problem(method)
    for run in (changed, kept):
        run.run(range(2))
    changed.optimizer.param_groups[0][name] = 3 * defaults[name]
    changed.run([2])
    kept.run([2])
    assert not torch.equal(changed.model.first.weight, kept.model.first.weight)
