"""Linear layers with int8 weights: files, conversion of models and back, training by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subspan.layers import (
    QuantisedLinear,
    QuantisedWeight,
    dequantise_linear,
    quantise_linear,
)
from subspan.linalg import generator


class Tied(nn.Module):
    """Two layers with one weight, one module under two names, a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.again = self.first
        self.output = nn.Linear(12, 50, bias=False)
        self.output.weight = self.embed.weight
        self.lm_head = nn.Linear(12, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.again(self.second(self.first(self.embed(tokens)))))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 48), nn.Tanh(), nn.Linear(48, 3))


def test_state_dict_is_plain_and_goes_through_safetensors(tmp_path: Path) -> None:
    model = quantise_linear(mlp())
    state = model.state_dict()
    assert [name for name in state if name.startswith("0.")] == [
        "0.bias",
        "0.weight.codes",
        "0.weight.scale",
        "0.weight.zero",
    ]
    assert all(type(tensor) is Tensor for tensor in state.values())
    save_file(state, tmp_path / "model.safetensors")
    other = quantise_linear(mlp(seed=1))
    weight = other[0].weight
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other[0].weight is weight
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True)
    )
    x = torch.randn(4, 10)
    assert torch.equal(model(x), other(x))


def test_a_model_on_the_meta_device_is_filled_by_assigning() -> None:
    source = quantise_linear(mlp())
    with torch.device("meta"):
        empty = quantise_linear(mlp())
    assert empty[0].weight.is_meta
    empty.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(empty[0].weight, QuantisedWeight)
    assert isinstance(empty[0].weight, nn.Parameter)
    x = torch.randn(4, 10)
    assert torch.equal(source(x), empty(x))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_float_weight_quantises_it(assign: bool) -> None:
    source, model = mlp(seed=1), quantise_linear(mlp(), group=32)
    model.load_state_dict(source.state_dict(), assign=assign)
    expected = QuantisedWeight.from_float(source[0].weight, 32)
    assert torch.equal(model[0].weight.codes, expected.codes)
    assert torch.equal(model[0].weight.scale, expected.scale)


def test_state_that_does_not_fit_is_named() -> None:
    model = quantise_linear(mlp())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        quantise_linear(mlp()).load_state_dict({k: v for k, v in state.items() if "scale" not in k})
    with pytest.raises(RuntimeError, match=r"0.weight: scale and zero must have the shape \(15,\)"):
        quantise_linear(mlp(), group=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        QuantisedLinear(10, 47, bias=False).load_state_dict({"weight": torch.zeros(48, 10)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.other"):
        model.load_state_dict({**state, "0.other": torch.zeros(1)})


def test_layers_of_blocks_are_replaced_and_heads_are_not() -> None:
    model = Tied()
    bias = model.first.bias
    assert quantise_linear(model) is model
    assert type(model.first) is QuantisedLinear and model.again is model.first
    assert type(model.second) is QuantisedLinear and model.second.weight is model.first.weight
    assert model.first.bias is bias
    assert type(model.lm_head) is nn.Linear
    assert type(model.output) is nn.Linear and model.output.weight is model.embed.weight
    model(torch.arange(5)).sum().backward()
    assert model.first.weight.grad.shape == (12, 12)
    assert dequantise_linear(model) is model
    assert type(model.first) is nn.Linear and model.again is model.first
    assert model.second.weight is model.first.weight


def test_patterns_choose_layers() -> None:
    chosen = quantise_linear(Tied(), include=["lm_head", "first", "output"])
    assert type(chosen.lm_head) is QuantisedLinear
    # They share their weights with layers that were not chosen.
    assert type(chosen.first) is nn.Linear and type(chosen.output) is nn.Linear
    assert type(quantise_linear(mlp(), exclude="2")[2]) is nn.Linear
    alone = quantise_linear(nn.Linear(4, 4), bits=4, group=8)
    assert type(alone) is QuantisedLinear and "bits=4, group=8" in repr(alone)
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{argument}='no' matches no linear layer.*'0'"):
            quantise_linear(mlp(), **{argument: "no"})
        with pytest.raises(ValueError, match=rf"{argument}='\(' is not a regular expression"):
            quantise_linear(mlp(), **{argument: "("})


def test_mode_and_frozen_weights_are_kept() -> None:
    model = mlp().eval()
    model[0].weight.requires_grad_(False)
    quantise_linear(model)
    assert not model[0].training and not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    dequantise_linear(model)
    assert not model[0].weight.requires_grad and not model[0].training


def test_back_to_float_has_the_same_outputs() -> None:
    model = quantise_linear(mlp())
    x = torch.randn(4, 10)
    before = model(x)
    dequantise_linear(model)
    assert type(model[0]) is nn.Linear and type(model[0].weight) is nn.Parameter
    assert torch.equal(model(x), before)
    again = quantise_linear(mlp()).to(torch.bfloat16)
    assert dequantise_linear(again)[0].weight.dtype == torch.bfloat16


def test_attention_takes_a_quantised_output_projection() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    quantised = QuantisedWeight.from_float(attention.out_proj.weight)
    attention.out_proj.weight = nn.Parameter(quantised.dequantise())
    expected = attention(x, x, x)[0]
    attention.out_proj.weight = nn.Parameter(quantised)
    assert torch.allclose(attention(x, x, x)[0], expected, atol=1e-6)


def train(model: nn.Module, steps: int, lr: float, rounding: torch.Generator | None) -> list[float]:
    """Plain gradient descent on a fixed regression; the losses."""
    x = torch.randn(64, 10, generator=generator(7))
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3]], dim=1)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), target)
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in model.parameters():
                if isinstance(p, QuantisedWeight):
                    p.quantise_(p.dequantise() - lr * p.grad, rounding)
                else:
                    p -= lr * p.grad
    return losses


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_with_stochastic_rounding_lowers_the_loss_as_float_does(seed: int) -> None:
    exact = train(mlp(seed), 150, 0.1, None)
    found = train(quantise_linear(mlp(seed), group=32), 150, 0.1, generator(seed))
    assert exact[-1] < 0.5 * exact[0]
    assert found[-1] < exact[-1] + 0.1 * (exact[0] - exact[-1])


@pytest.mark.parametrize("seed", [0, 1])
def test_small_steps_are_lost_to_nearest_and_kept_on_average_by_chance(seed: int) -> None:
    # The extremes of each group make a grid of steps of 0.01 and stay, so that the grid does.
    values = torch.rand(16, 256, generator=generator(seed)) - 0.5
    values[:, 0], values[:, 1] = -1.27, 1.28
    step = torch.full((16, 256), 0.0002)
    step[:, :2] = 0

    def moved(rounding: torch.Generator | None) -> Tensor:
        """Fifty steps of 0.02 of the grid: by how many steps of the grid the weights moved."""
        weight = QuantisedWeight.from_float(values.view(64, 64))
        start = weight.dequantise()
        for _ in range(50):
            weight.quantise_(weight.dequantise() + step.view(64, 64), rounding)
        return ((weight.dequantise() - start) / 0.01).view(16, 256)[:, 2:]

    assert float(moved(None).abs().max()) < 1e-3
    steps = moved(generator(seed))
    # The sum of 50 chances of 0.02: mean 1, variance 50 * 0.02 * 0.98.
    assert float(steps.mean()) == pytest.approx(1.0, abs=5 * 0.99 / steps.numel() ** 0.5)
    assert float(steps.std()) == pytest.approx(0.99, abs=0.06)
