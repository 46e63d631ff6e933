"""Flora's step on plain matrices in blocks of rows, against Adafactor with momentum written out."""

from __future__ import annotations

import math

import pytest
import torch

from subspan import optim
from subspan.optim.parts import adafactor
from subspan.optim.parts.adafactor import mean_squares, row_blocks

EPS, FLOOR, DECAY = 1e-30, 1e-3, -0.8


def expected(weight, gradients, lr, beta, weight_decay, clip):
    """Whole-matrix Adafactor with momentum, in float64."""
    row, col, momentum = 0.0, 0.0, torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        share = 1.0 - float(step) ** DECAY
        squares = gradient**2 + EPS
        row = share * row + (1 - share) * squares.mean(1)
        col = share * col + (1 - share) * squares.mean(0)
        scaled = gradient / torch.sqrt(torch.outer(row / row.mean(), col))
        momentum = beta * momentum + (1 - beta) * scaled
        rate = lr * max(FLOOR, float(weight.square().mean().sqrt()))
        clipped = momentum / max(1.0, float(momentum.square().mean().sqrt()) / clip)
        weight = weight * (1 - rate * weight_decay) - rate * clipped
    return weight


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("clip", [0.3, 10.0])
def test_plain_matrices_take_adafactors_step_whatever_the_size_of_a_block(
    seed, rows_per_block, clip, monkeypatch
):
    monkeypatch.setattr(adafactor, "_BLOCK", rows_per_block * 5)
    generator = torch.Generator().manual_seed(seed)
    start, *gradients = torch.randn(5, 7, 5, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.1, "clip_threshold": clip, "beta1": 0.8}
    optimizer = optim.Flora([{"params": [weight], "project": False}], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(
        weight.detach(), expected(start, gradients, 0.1, 0.8, 0.1, clip), rtol=1e-10, atol=1e-12
    )


def test_a_batch_of_plain_matrices_equals_its_members(monkeypatch):
    monkeypatch.setattr(adafactor, "_BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    starts, gradients = torch.randn(2, 3, 6, 4, generator=generator)
    results = []
    for members in ([0, 1, 2], [0], [1], [2]):
        weights = [torch.nn.Parameter(starts[i].clone()) for i in members]
        # Batches are never larger than the largest parameter.
        filler = torch.nn.Parameter(torch.ones(100, 4))
        optimizer = optim.Flora([{"params": [*weights, filler], "project": False}], lr=0.1)
        for weight, i in zip(weights, members, strict=True):
            weight.grad = gradients[i].clone()
        optimizer.step()
        results.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(results[0], torch.cat(results[1:]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_of_a_plain_matrix_changes_nothing(bad):
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = optim.Flora([{"params": [weight], "project": False}], lr=0.1)
    weight.grad = torch.ones(6, 4)
    optimizer.step()
    before = weight.detach().clone(), optimizer.state[weight]["gradient_sq_row"].clone()
    weight.grad[3, 2] = bad
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.state[weight]["gradient_sq_row"], before[1])


def test_a_finite_gradient_whose_squares_overflow_is_not_called_bad():
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = optim.Flora([{"params": [weight], "project": False}], lr=0.1)
    weight.grad = torch.full((6, 4), 1e30)
    optimizer.step()


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (1, 1), (0, 4)])
def test_blocks_cover_every_row_once_and_means_are_those_of_the_whole(shape, monkeypatch):
    monkeypatch.setattr(adafactor, "_BLOCK", 10)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covered = [i for rows in row_blocks(x) for i in range(rows.start, rows.stop)]
    assert covered == list(range(shape[-2]))
    row, column = mean_squares(x, 1e-3, torch.empty_like(x))
    torch.testing.assert_close(row, x.square().add(1e-3).mean(-1))
    if shape[-2]:
        torch.testing.assert_close(column, x.square().add(1e-3).mean(-2))
