"""Gradients of embeddings and output layers that are made and applied in blocks of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import subspan.optim as optim
import subspan.optim.rowwise as rowwise


class Language(nn.Module):
    def __init__(self, *, tied: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(1300, 16, padding_idx=padding_idx)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 1300, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens)).tanh())


def train(model: nn.Module, optimizer: optim.SubspaceOptimizer, steps: int) -> list[torch.Tensor]:
    for step in range(steps):
        tokens = torch.randint(0, 1300, (2, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("storage", ["parameter", "int8", "int4"])
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("method", ["galore", "adamw"])
def test_updates_by_rows_equal_ordinary_ones(monkeypatch, method, storage, padding_idx):
    monkeypatch.setattr(rowwise, "BLOCK", 512 * 16)
    results, bytes_held = [], []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Language(padding_idx=padding_idx)
        optimizer = optim.for_model(model, method, lr=1e-2, storage=storage)
        if attach:
            optimizer.attach_to_backward(model)
            assert "forward" in vars(model.embed) and "forward" in vars(model.head)
            assert "forward" not in vars(model.layer)
        results.append(train(model, optimizer, 4))
        bytes_held.append(optimizer.state_bytes())
        assert all(optimizer.state[p]["step"] == 4 for p in model.parameters())
    # A moment in the middle between two codes may take the other one.
    tolerance = 1e-6 if storage == "parameter" else 2e-3
    for ordinary, fused in zip(*results, strict=True):
        torch.testing.assert_close(ordinary, fused, rtol=0, atol=tolerance)
    assert bytes_held[0] == bytes_held[1]


def test_the_whole_gradient_never_exists(monkeypatch):
    monkeypatch.setattr(rowwise, "BLOCK", 512 * 16)
    model = Language()
    optimizer = optim.for_model(model, "adamw")
    optimizer.attach_to_backward(model)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            shape = getattr(result, "shape", ())
            if len(shape) == 2 and 16 in shape and result.is_contiguous():
                largest = max(largest, result.numel())
            return result

    train(model, optimizer, 1)  # allocates the states
    tokens = torch.arange(18).view(2, 9)
    loss = model(tokens).sum()
    with Watch():
        loss.backward()
    assert largest < 1300 * 16


def test_tied_weights_keep_their_summed_gradient(monkeypatch):
    monkeypatch.setattr(rowwise, "BLOCK", 512 * 16)
    results = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Language(tied=True)
        optimizer = optim.for_model(model, "galore", lr=1e-2)
        if attach:
            optimizer.attach_to_backward(model)
            assert "forward" not in vars(model.embed)
        results.append(train(model, optimizer, 3))
    for ordinary, fused in zip(*results, strict=True):
        torch.testing.assert_close(ordinary, fused)


def test_detaching_gives_the_layers_back(monkeypatch):
    monkeypatch.setattr(rowwise, "BLOCK", 512 * 16)
    model = Language()
    optimizer = optim.for_model(model, "galore")
    optimizer.attach_to_backward(model).detach()
    assert "forward" not in vars(model.head)
    model(torch.arange(5)).sum().backward()
    assert model.head.weight.grad is not None
    optimizer.step()


def test_a_bad_gradient_is_refused_before_its_rows_change(monkeypatch):
    monkeypatch.setattr(rowwise, "BLOCK", 512 * 16)
    model = Language()
    optimizer = optim.for_model(model, "galore")
    optimizer.attach_to_backward(model)
    before = model.head.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"head\.weight"):
        (model(torch.arange(5)).sum() * float("nan")).backward()
    assert torch.equal(before, model.head.weight)
