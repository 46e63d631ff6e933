"""examples/torchtitan_optimizer.py, where torchtitan is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import subspan.optim

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "torchtitan_optimizer.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")
    spec = importlib.util.spec_from_file_location("torchtitan_optimizer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        network(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.real
@pytest.mark.parametrize("method", ["galore", "fira", "muon"])
def test_container_trains_saves_and_resumes_like_the_optimizer_itself(
    example: ModuleType, method: str
) -> None:
    options = {} if method == "muon" else {"rank": 2, "update_proj_gap": 3}
    config = example.SubspanOptimizers.Config(method=method, lr=0.01, options=options)
    alone, inside, resumed = model(), model(), model()
    train(alone, subspan.optim.for_model(alone, method, lr=0.01, **options), 0, 8)
    container = example.SubspanOptimizers(config, model_parts=[inside])
    train(inside, container, 0, 5)
    saved = container.state_dict()
    resumed.load_state_dict(inside.state_dict())
    other = example.SubspanOptimizers(config, model_parts=[resumed])
    other.load_state_dict(saved)
    train(resumed, other, 5, 8)
    for weight, expected in zip(resumed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(weight, expected)
