"""The check for NaN and infinity, and steps whose check is a norm that they take anyway."""

import math

import pytest
import torch
from torch import nn

from subspan import optim
from subspan.optim import collect
from subspan.optim.parts import descent

BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_bad_entry_makes_the_sum_bad(size, dtype, monkeypatch):
    monkeypatch.setattr(collect, "SMALL", 1)
    assert math.isfinite(collect._sum(torch.ones(size, dtype=dtype)))
    for position in range(size):
        for value in BAD:
            gradient = torch.zeros(size, dtype=dtype)
            gradient[position] = value
            assert not math.isfinite(collect._sum(gradient))


def test_sum_of_no_entries_is_finite(monkeypatch):
    monkeypatch.setattr(collect, "SMALL", 0)
    assert math.isfinite(collect._sum(torch.zeros(0)))


METHODS = {
    "fira": {"rank": 2},
    "apollo": {"rank": 2},
    "apollo_mini": {},
    "subset_norm": {},
    "subspace_momentum": {"rank": 2},
    "subset_norm_subspace_momentum": {"rank": 2},
    "frugal": {},
    "sgd": {},
}


def _made(method, shape):
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    groups = [{"params": [weight], "project": True}]
    return weight, optim.build(method, groups, lr=0.1, **METHODS[method])


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_bad_entry_changes_neither_weight_nor_state(method, shape):
    weight, optimizer = _made(method, shape)
    for _ in range(2):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    before = weight.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[weight].items() if torch.is_tensor(v)}
    for value in BAD:
        weight.grad = torch.ones(shape)
        weight.grad[-1, -1] = value
        with pytest.raises(FloatingPointError):
            optimizer.step()
        assert torch.equal(weight, before)
        for name, moment in moments.items():
            assert torch.equal(optimizer.state[weight][name], moment), name


@pytest.mark.parametrize("method", METHODS)
def test_large_finite_gradient_is_not_refused(method):
    weight, optimizer = _made(method, (6, 4))
    weight.grad = torch.full((6, 4), 1e25)  # whose square is infinite in float32
    optimizer.step()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("transposed", [False, True])
def test_sign_descent_in_pieces_is_the_formula(seed, transposed, monkeypatch):
    monkeypatch.setitem(descent.PIECE, "cpu", 5)
    draw = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(4, 6, generator=draw) for _ in range(2))
    gradient[0, 0] = 0.0
    expected = (weight.double() * (1 - 0.1 * 0.5) - 0.2 * gradient.double().sign()).float()
    if transposed:
        weight, gradient = (tensor.T.contiguous().T for tensor in (weight, gradient))
    descent.SignDescent().step_weights([weight], [gradient], [{}], 1, 0.1, 0.5, 0.2)
    torch.testing.assert_close(weight, expected)
