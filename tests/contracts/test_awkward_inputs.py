"""Awkward gradients, dtypes, shapes and checkpoints, for every registered recipe.

Each row of the reliability table that earlier packages fail has its test here: a defined result, or
a clear error.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from problem import GAP, Problem, options_for, same, snapshot
from torch import nn

import subspan.optim as optim
from subspan.optim.parts.refresh import Every, Lazy
from subspan.subspaces.geometry import captured_energy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2, GAP])
def test_nonfinite_gradient_is_refused_and_updates_nothing_it_belongs_to(problem, value, step):
    run = problem()
    run.run(range(step))
    run.backward(step)
    # Of methods that freeze parameters, one whose turn it is.
    preferred = ("first.weight", *(name for name, _ in run.model.named_parameters()))
    name = next(n for n in preferred if run.model.get_parameter(n).grad is not None)
    spoilt = run.model.get_parameter(name)
    spoilt.grad.view(-1)[0] = value
    weight, state = spoilt.detach().clone(), copy.deepcopy(dict(run.optimizer.state[spoilt]))
    with pytest.raises(FloatingPointError, match=re.escape(repr(name))):
        run.optimizer.step()
    assert torch.equal(weight, spoilt)
    after = run.optimizer.state[spoilt]
    for name, before in state.items():
        if isinstance(before, torch.Tensor) and step:
            assert torch.equal(before, after[name])
    assert all(w.isfinite().all() for w in run.weights())
    # Nothing of it is left: training goes on with good gradients.
    run.run(range(step, step + 2))
    assert all(w.isfinite().all() for w in run.weights())


def test_nonfinite_gradient_can_be_skipped(problem):
    run, clean = problem(nonfinite="skip"), problem()
    clean.run(range(GAP + 2))
    run.run(range(2))
    run.backward(2)
    spoilt = next(p for p in reversed(list(run.model.parameters())) if p.grad is not None)
    spoilt.grad.view(-1)[0] = float("nan")
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    run.run(range(2, GAP + 2))
    assert same(clean.weights(), run.weights())


def test_unchecked_gradients_give_the_same_run(problem):
    checked, unchecked = problem(), problem(nonfinite="ignore")
    checked.run(range(GAP + 1))
    unchecked.run(range(GAP + 1))
    assert same(checked.weights(), unchecked.weights())


def test_zero_gradients_from_the_start_move_nothing(problem):
    run = problem(weight_decay=0.0)
    before = run.weights()
    for _ in range(GAP + 1):
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
    assert same(before, run.weights())


def test_zero_gradient_on_a_refresh_step_does_not_spoil_the_basis(method):
    recipe = optim.methods()[method]
    composition = optim.build(
        method, [nn.Parameter(torch.ones(8, 8))], **options_for(method)
    ).composition(0)
    if composition.finder is None or not composition.finder.reads_gradient:
        return  # the basis does not depend on the gradient
    assert recipe.name == method
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(24, 2, generator=generator) @ torch.randn(2, 24, generator=generator)
    weight = nn.Parameter(torch.zeros(24, 24))
    optimizer = optim.build(method, [weight], **options_for(method, storage="parameter"))
    for blank in (True, False, False):
        weight.grad = torch.zeros(24, 24) if blank else signal.clone()
        optimizer.step()
    subspace = optimizer.subspace_of(weight)
    captured = captured_energy(signal, subspace)
    # Four of the 24 columns of a fixed matrix cannot hold all, nor can a basis that has moved on,
    # but chosen for zeros they hold less.
    exact = composition.finder.form == "dense" and not composition.finder.follows
    assert captured > (0.998 if exact else 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_train(problem, dtype):
    run = problem(dtype=dtype)
    with torch.no_grad():
        before = sum(run.loss(step).item() for step in range(8))
    run.run(range(40))
    with torch.no_grad():
        after = sum(run.loss(step).item() for step in range(8))
    assert all(weight.isfinite().all() for weight in run.weights())
    assert after < before


def test_small_float16_gradients_stay_finite(method):
    weight = nn.Parameter(torch.randn(16, 32).half())
    optimizer = optim.build(method, [weight], **options_for(method))
    for step in range(GAP + 2):
        weight.grad = (
            1e-4 * torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        ).half()
        optimizer.step()
    assert weight.isfinite().all()


def test_bf16_weights_move_on_average_as_float32_ones(method):
    moved = {}
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(64, 64, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = optim.build(method, [weight], **options_for(method, lr=1e-4, weight_decay=0.0))
        for _ in range(3 * GAP):
            weight.grad = direction.to(dtype)
            optimizer.step()
        moved[dtype] = weight.detach().float() - 1
    fraction = (moved[torch.bfloat16] * moved[torch.float32]).sum() / moved[
        torch.float32
    ].square().sum()
    # Nearest rounding would leave it near 0: a step is far below half a bf16 unit at 1. The noise
    # of 4096 entries is not.
    assert 0.5 < fraction < 1.5


SHAPES = [
    (),
    (1,),
    (7,),
    (1, 1),
    (1, 9),
    (9, 1),
    (2, 3),
    (3, 4, 5),
    (4, 3, 3, 3),
    (2, 3, 2, 2, 2),
    (0, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_has_a_defined_result(method, shape):
    weight = nn.Parameter(torch.randn(shape))
    options = options_for(method)
    optimizer = optim.build(method, [weight], **options)
    for step in range(GAP + 1):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert weight.shape == torch.Size(shape)
    assert weight.isfinite().all()


def test_rank_above_the_smaller_dimension_means_full_rank(method):
    if not optim.methods()[method].defaults.get("rank"):
        return  # no rank to be too large
    weight = nn.Parameter(torch.randn(8, 20))
    optimizer = optim.build(method, [weight], **options_for(method, rank=1000))
    weight.grad = torch.randn(8, 20)
    optimizer.step()
    assert optimizer.layout_of(weight).rank == 8
    moments = [
        v
        for k, v in optimizer.state[weight].items()
        if isinstance(v, torch.Tensor) and "exp_avg" in k
    ]
    assert all(moment.numel() <= weight.numel() for moment in moments)


def test_rank_as_a_fraction_is_of_the_smaller_dimension(method):
    if not optim.methods()[method].defaults.get("rank"):
        return
    weight = nn.Parameter(torch.randn(8, 20))
    optimizer = optim.build(method, [weight], **options_for(method, rank=0.25))
    assert optimizer.layout_of(weight).rank == 2


@pytest.mark.parametrize("rank", [0, -3, 1.5, float("nan"), True, "four"])
def test_impossible_rank_is_refused_at_construction(method, rank):
    if not optim.methods()[method].defaults.get("rank"):
        return
    with pytest.raises((ValueError, TypeError), match="rank"):
        optim.build(method, [nn.Parameter(torch.randn(8, 20))], **options_for(method, rank=rank))


def test_stacked_experts_are_projected_one_by_one(method):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 12, 20, generator=generator)
    gradients = torch.randn(GAP + 2, 3, 12, 20, generator=generator)
    together = nn.Parameter(stack.clone())
    optimizer = optim.build(
        method, [{"params": [together], "stacked": True, "project": True}], **options_for(method)
    )
    for gradient in gradients:
        together.grad = gradient.clone()
        optimizer.step()
    layout = optimizer.layout_of(together)
    assert layout.view == (3, 12, 20)
    assert together.isfinite().all()
    assert not torch.equal(together, stack)


def test_channels_last_convolution_equals_the_contiguous_one(method):
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    result = []
    for form in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weight.clone(memory_format=form))
        optimizer = optim.build(method, [parameter], **options_for(method))
        for step in range(GAP + 1):
            gradient = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(step))
            parameter.grad = gradient.to(memory_format=form)
            optimizer.step()
        assert parameter.is_contiguous(memory_format=form)
        result.append(parameter.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(*result)


def test_non_contiguous_parameter_is_updated_in_place(method):
    base = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    plain, turned = nn.Parameter(base.T.contiguous()), nn.Parameter(base.T)
    for parameter in (plain, turned):
        optimizer = optim.build(method, [parameter], **options_for(method))
        for step in range(GAP + 1):
            parameter.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(plain.detach(), turned.detach())


def test_batched_buckets_equal_single_ones(method, monkeypatch):
    import subspan.optim.collect as collect

    batched = Problem(method, torch.float64)
    batched.run(range(2 * GAP))
    monkeypatch.setattr(collect, "SMALL", 0)
    single = Problem(method, torch.float64)
    single.run(range(2 * GAP))
    for a, b in zip(batched.weights(), single.weights(), strict=True):
        assert (a - b).abs().median() < 1e-9


def test_elementwise_pieces_equal_the_whole(method, monkeypatch):
    import subspan.optim.collect as collect

    whole = Problem(method, torch.float16)
    whole.run(range(GAP))
    monkeypatch.setitem(collect.PIECE, "cpu", 100)
    cut = Problem(method, torch.float16)
    cut.run(range(GAP))
    assert same(whole.weights(), cut.weights())


def test_sparse_gradient_is_refused_with_a_remedy(method):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = optim.build(method, table.named_parameters(), **options_for(method))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_complex_parameter_is_trained_plainly_and_refused_in_a_projected_group(method):
    weight = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))
    optimizer = optim.build(method, [("weight", weight)], **options_for(method))
    before = weight.detach().clone()
    for _ in range(3):
        weight.grad = torch.ones_like(weight) * (1 + 2j)
        optimizer.step()
    assert weight.isfinite().all()
    assert not torch.equal(before, weight)
    composition = optimizer.composition(0)
    if composition.finder is not None or composition.activity is not None:
        with pytest.raises(ValueError, match="complex"):
            optim.build(method, [{"params": [weight], "project": True}], **options_for(method))


def test_tied_and_repeated_weights_are_updated_once(method):
    weight = nn.Parameter(torch.randn(8, 12))
    once = nn.Parameter(weight.detach().clone())
    twice = optim.build(method, [weight, weight], **options_for(method))
    single = optim.build(method, [once], **options_for(method))
    for parameter in (weight, once):
        parameter.grad = torch.ones(8, 12) + torch.eye(8, 12)
    twice.step()
    single.step()
    assert torch.equal(weight, once)


def test_frozen_parameter_keeps_its_value_and_costs_nothing(problem):
    run = problem()
    run.model.first.weight.requires_grad_(False)
    before = run.model.first.weight.clone()
    run.run(range(GAP))
    assert torch.equal(before, run.model.first.weight)
    assert not run.optimizer.state.get(run.model.first.weight)


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


def test_sharded_parameter_is_refused_at_construction(method, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
        with pytest.raises(TypeError, match="sharded"):
            optim.build(method, [weight], **options_for(method))
    finally:
        dist.destroy_process_group()
