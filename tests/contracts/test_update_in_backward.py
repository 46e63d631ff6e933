"""Updates inside the backward pass, for every recipe: as ordinary steps, or clearly refused."""

from __future__ import annotations

import pytest
import torch
from problem import GAP, same
from torch import nn

import subspan.optim as optim


def close(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_updates_in_the_backward_pass_equal_ordinary_steps(problem):
    ordinary, fused = problem(dtype=torch.float64), problem(dtype=torch.float64)
    fused.optimizer.attach_to_backward(fused.model)
    for step in range(2 * GAP):
        ordinary.run([step])
        fused.backward(step)
        assert all(parameter.grad is None for parameter in fused.model.parameters())
        fused.optimizer.step()
    close(ordinary.weights(), fused.weights())


def test_a_run_in_the_backward_pass_resumes_as_ordinary_one(problem):
    first, second = problem(dtype=torch.float64), problem(dtype=torch.float64)
    handle = first.optimizer.attach_to_backward()
    first.run(range(GAP + 1))
    handle.detach()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    first.run(range(GAP + 1, 2 * GAP + 2))
    second.run(range(GAP + 1, 2 * GAP + 2))
    assert same(first.weights(), second.weights())


def test_attaching_twice_is_refused(problem):
    run = problem()
    handle = run.optimizer.attach_to_backward()
    with pytest.raises(RuntimeError, match="already"):
        run.optimizer.attach_to_backward()
    handle.detach()
    run.optimizer.attach_to_backward().detach()


def test_clipping_each_gradient_equals_clipping_it_before_the_step(problem):
    ordinary, fused = problem(dtype=torch.float64), problem(dtype=torch.float64)
    fused.optimizer.attach_to_backward(max_norm=0.02, clipping="each")
    for step in range(GAP + 2):
        ordinary.backward(step)
        for parameter in ordinary.model.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_([parameter], 0.02)
        ordinary.optimizer.step()
        fused.run([step])
    close(ordinary.weights(), fused.weights())


def test_clipping_by_the_common_norm_is_exact_or_refused(problem):
    ordinary, fused = problem(dtype=torch.float64), problem(dtype=torch.float64)
    try:
        fused.optimizer.attach_to_backward(max_norm=0.05)
    except ValueError as error:
        assert "clipping='each'" in str(error)
        return
    for step in range(2 * GAP):
        ordinary.backward(step)
        norm = nn.utils.clip_grad_norm_(ordinary.model.parameters(), 0.05)
        assert norm > 0.05
        ordinary.optimizer.step()
        fused.run([step])
    close(ordinary.weights(), fused.weights())


@pytest.mark.parametrize("lifted", [False, True])
def test_accumulation_inside_the_subspace_is_exact_or_refused(problem, lifted):
    ordinary, fused = problem(dtype=torch.float64), problem(dtype=torch.float64)
    try:
        fused.optimizer.attach_to_backward(accumulation_steps=3, lifted=lifted)
    except ValueError as error:
        assert "lifted=True" in str(error)
        return
    for step in range(GAP + 3):
        for run in (ordinary, fused):
            run.optimizer.zero_grad()
            for part in range(3):
                (run.loss(3 * step + part) / 3).backward()
            run.optimizer.step()
    assert all(weight.isfinite().all() for weight in fused.weights())
    everything_needed = any(
        optim_parts is not None and optim_parts.needs_whole_gradient
        for optim_parts in map(fused.optimizer.parts_of, fused.model.parameters())
    )
    if not everything_needed:  # then nothing was lost by summing coordinates
        close(ordinary.weights(), fused.weights())


def test_checking_all_gradients_first_cannot_be_combined(method):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = optim.build(method, [weight], nonfinite="skip")
    with pytest.raises(ValueError, match="nonfinite='skip'"):
        optimizer.attach_to_backward()
