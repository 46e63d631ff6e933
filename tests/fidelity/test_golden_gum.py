"""GUM against a float64 transcription of its published formulas (no official code is known), its
unbiasedness, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from recording import PARAMETERS, follow, load, recorded_bases

import subspan.optim as optim
from subspan.optim.parts.activity import Sampled
from subspan.optim.parts.descent import SGD
from subspan.optim.parts.muon import Muon
from subspan.subspaces.finders import SVD, Replay

MATRICES = PARAMETERS[1:]


@pytest.mark.parametrize("form", [{"q": 0.3}, {"gamma": 1}])
def test_equals_the_transcribed_trajectory(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the recorded draws. The forms differ by weights that cancel in Newton-Schulz."""
    recording, spec = load("ref_gum_q0.3")

    def recorded(self: Sampled, period: int, layouts: object) -> frozenset[int]:
        step = period * self.gap + 1
        full = [bool(recording[f"draw/{p}/step{step:02d}"]) for p in MATRICES]
        return frozenset(i for i, drawn in enumerate(full) if not drawn)

    monkeypatch.setattr(Sampled, "active", recorded)
    follow(
        lambda weights: optim.build(
            "gum",
            list(weights.items()),
            lr=spec["lr"],
            rank=spec["rank"],
            update_proj_gap=spec["update_gap"],
            momentum=spec["momentum"],
            adjust_lr_fn="none",
            finder=Replay(recorded_bases(recording)),
            **form,
        ),
        recording,
        tolerance=5e-6,
        parameters=MATRICES,
    )


def groups(count: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64)) for _ in range(count)]


@pytest.mark.parametrize("q", [0.2, 0.5])
def test_expected_input_of_both_kinds_of_update_is_the_gradient(q: float) -> None:
    """Gradient descent in place of Muon makes the weights the sum of the inputs."""
    recipe = optim.lookup("gum")
    made = recipe.compose({**recipe.defaults, "rank": 2, "q": q, "update_proj_gap": 1})
    idle = replace(made.idle, inner=SGD())
    made = replace(made, inner=SGD(), plain=SGD(), idle=idle)
    weights = groups(30)
    optimizer = optim.Composed(weights, composition=made, lr=1.0)
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(20):
        for weight in weights:
            weight.grad = gradient.clone()
        optimizer.step()
    mean = -torch.stack([weight.detach() for weight in weights]).mean(0) / 20
    # 600 coins: a standard error of 0.08 or less of the part that a kind of update holds.
    assert (mean - gradient).norm() < 0.15 * gradient.norm()
    inside = torch.linalg.svd(gradient)[0][:, :2]
    biased = inside @ inside.T @ gradient
    assert (biased - gradient).norm() > 0.3 * gradient.norm()


@pytest.mark.parametrize("gamma", [0, 1, 3, 9])
def test_exactly_gamma_layers_are_at_full_size_and_they_change(gamma: int) -> None:
    weights = groups(6)
    optimizer = optim.build("gum", weights, rank=2, gamma=gamma, update_proj_gap=2)
    seen = set()
    for step in range(20):
        for number, weight in enumerate(weights):
            draw = torch.Generator().manual_seed(10 * step + number)
            weight.grad = torch.randn(6, 9, generator=draw, dtype=torch.float64)
        optimizer.step()
        buffers = [optimizer.state[weight]["momentum_buffer"].shape for weight in weights]
        full = [i for i, shape in enumerate(buffers) if shape == (6, 9)]
        assert len(full) == min(gamma, 6)
        assert all(buffers[i] == (2, 9) for i in range(6) if i not in full)
        seen.update(full)
    assert len(seen) > gamma or gamma in (0, 9)


def test_momentum_starts_again_with_every_period() -> None:
    weight = groups(1)[0]
    optimizer = optim.build("gum", [weight], rank=2, q=0.0, update_proj_gap=3)
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        weight.grad = torch.randn(6, 9, generator=draw, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[weight]
    only = 0.05 * state["basis"].T @ weight.grad
    torch.testing.assert_close(state["momentum_buffer"], only)


def test_without_full_layers_it_is_muon_in_the_leading_subspace() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 6, 9, generator=draw, dtype=torch.float64)
    ours, theirs = groups(2)
    inner = Muon(0.95, nesterov=False, adjust="match_rms_adamw")
    parts = optim.Composition(inner=inner, finder=SVD(), rank=2)
    optimizers = (
        optim.build("gum", [ours], lr=0.01, rank=2, q=0.0, finder="svd"),
        optim.Composed([theirs], composition=parts, lr=0.01),
    )
    for gradient in gradients:
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [{"q": -0.1}, {"q": 1.5}, {"gamma": -1}, {"gamma": 1.5}], ids=str)
def test_impossible_shares_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        optim.build("gum", groups(1), **bad)
