"""What an optimizer says beforehand that it will hold, and what it then holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import subspan.optim as optim
from subspan.layers import quantise_linear


def llama(hidden: int, intermediate: int, layers: int, vocabulary: int = 32000) -> nn.Module:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        vocab_size=vocabulary,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def test_q_galore_trains_seven_billion_parameters_in_sixteen_gigabytes():
    with torch.device("meta"):
        model = llama(4096, 11008, 32).to(torch.bfloat16)
    quantise_linear(model)
    optimizer = optim.for_model(model, "q_galore", rank=1024, update_proj_gap=500)
    plan = optimizer.memory()
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    # int8 block weights with scale and zero per 256, bf16 for the rest.
    matrices, others = 6_476_005_376, 262_410_240
    assert plan["weights"] == matrices + matrices // 256 * 5 + 2 * others
    assert plan["largest_gradient"] == 32000 * 4096 * 2
    assert plan["total"] <= 16e9


@pytest.mark.parametrize("method", ["q_galore", "galore", "adamw"])
def test_a_real_run_holds_what_the_plan_said(method):
    torch.manual_seed(0)
    model = llama(128, 344, 3, 1024)
    quantise_linear(model)
    optimizer = optim.for_model(model, method, **({"rank": 32} if method != "adamw" else {}))
    plan = optimizer.memory()
    live, largest = 0, 0

    def arrived(parameter: torch.Tensor) -> None:
        nonlocal live, largest
        live = sum(
            p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None
        )
        largest = max(largest, live)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(arrived)
    optimizer.attach_to_backward()
    for step in range(2):
        ids = torch.randint(0, 1024, (1, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    weights = 0
    for parameter in model.parameters():
        names = ("codes", "scale", "zero") if hasattr(parameter, "codes") else ("data",)
        weights += sum(getattr(parameter, name).untyped_storage().nbytes() for name in names)
    states = [
        v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    ]
    state = sum(tensor.untyped_storage().nbytes() for tensor in states)
    assert weights + state + largest == pytest.approx(plan["total"], rel=0.02)
    assert weights == plan["weights"]
    assert largest == plan["largest_gradient"]
