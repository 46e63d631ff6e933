"""What is planned of weights, gradients and states is what training then holds, to the byte."""

from __future__ import annotations

import json

import pytest
import torch

from subspan.optim import methods
from subspan.optim.listing import active_in, declared_bytes, fullest_period
from subspan.plan import ModelSpec, Settings, make_plan
from subspan.plan.model import build_model, meta_model
from subspan.plan.parts import build_on, parts_of
from subspan.train.errors import JobError
from subspan.train.trainer import build_optimizer

RANKED = {"rank": 8}


def options_of(method: str) -> dict[str, object]:
    default = methods()[method].defaults.get("rank")
    return dict(RANKED) if isinstance(default, int) and default > 8 else {}


@pytest.mark.parametrize("method", sorted(methods()))
def test_plan_counts_what_the_trainer_s_optimizer_declares(folder, method):
    spec = ModelSpec(str(folder("llama")), dtype="float32")
    parts = parts_of(meta_model(spec).module, method, options_of(method), period=0)
    model = build_model(spec, "cpu").module
    optimizer = build_optimizer(model, method, **options_of(method))
    declared: dict[str, int] = {}
    for parameter, active in active_in(optimizer, 0).items():
        for kind, size in declared_bytes(optimizer, parameter, active).items():
            declared[kind] = declared.get(kind, 0) + size
    assert dict(parts.states) == declared


@pytest.mark.parametrize("method", sorted(methods()))
def test_two_steps_hold_what_was_planned(folder, method):
    spec = ModelSpec(str(folder("llama")), dtype="float32")
    planned = parts_of(meta_model(spec).module, method, options_of(method), period=0)
    torch.manual_seed(0)
    built = build_model(spec, "cpu")
    optimizer = build_on(built.module, method, options_of(method))
    inputs = built.make_inputs(2, 16)
    for _ in range(2):
        built.module(**inputs).loss.backward()
        gradients = sum(p.grad.nbytes for p in built.module.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    held = {kind: size for kind, size in optimizer.state_bytes().items() if kind != "total"}
    assert held == {kind: size for kind, size in planned.states.items() if size}
    assert sum(p.nbytes for p in built.module.parameters()) == planned.weights
    assert gradients == planned.gradients


@pytest.mark.parametrize(("method", "options"), [("frugal", {}), ("gum", {"rank": 8})])
def test_the_fullest_period_has_at_least_the_state_of_any_other(folder, method, options):
    module = meta_model(ModelSpec(str(folder("llama", 9)))).module
    optimizer = build_on(module, method, options)
    sizes = [
        sum(parts_of(module, method, options, period=period).states.values())
        for period in range(64)
    ]
    assert sizes[fullest_period(optimizer)] == max(sizes)
    assert sum(parts_of(module, method, options).states.values()) == max(sizes)
    assert min(sizes) < max(sizes) or method == "frugal"


def test_badam_plans_one_block_and_its_activations(folder):
    spec = ModelSpec(str(folder("llama", 9)), dtype="float32")
    one = make_plan(Settings(spec, "badam", batch_size=2))
    whole = make_plan(Settings(spec, "adamw", batch_size=2))
    block = sum(
        p.numel()
        for name, p in meta_model(spec).module.named_parameters()
        if name.startswith("model.layers.0.")
    )
    assert one.gradients == 4 * block and one.state == 8 * block
    assert one.activations < whole.activations


def test_int8_weights_and_states_take_what_their_codes_and_scales_take(folder):
    spec = ModelSpec(str(folder("llama")), int8_weights=True)
    made = make_plan(Settings(spec, "galore", {"rank": 8, "storage": "int8"}, batch_size=1))
    plain = make_plan(
        Settings(ModelSpec(str(folder("llama"))), "galore", {"rank": 8}, batch_size=1)
    )
    matrices = 3 * (4 * 64 * 64 + 3 * 176 * 64)
    assert plain.weights - made.weights == 2 * matrices - (matrices + matrices // 256 * 5)
    assert made.states["first_moment"] < plain.states["first_moment"] * 0.55


def test_an_option_that_a_method_does_not_have_is_one_line(folder):
    module = meta_model(ModelSpec(str(folder("llama")))).module
    with pytest.raises(JobError, match="AdamW has no option 'rank'"):
        parts_of(module, "adamw", {"rank": 8})


def test_adapters_train_only_themselves(folder, tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "adapter_config.json"
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    file.write_text(json.dumps(values))
    source = str(folder("llama"))
    base = make_plan(Settings(ModelSpec(source), "adamw", batch_size=2))
    plans = {
        kind: make_plan(
            Settings(ModelSpec(source, adapter=str(tmp_path), base_weights=kind), "adamw",
                     batch_size=2)
        )
        for kind in ("none", "int8", "int4")
    }  # fmt: skip
    trained = 3 * 4 * (64 + 64)
    lora = plans["none"]
    # PEFT trains its factors in float32.
    assert (lora.trained, lora.gradients, lora.state) == (trained, 4 * trained, 8 * trained)
    assert lora.weights == base.weights + 4 * trained
    assert lora.parameters == base.parameters and lora.activations < base.activations
    matrices = 3 * (4 * 64 * 64 + 3 * 176 * 64)
    assert lora.weights - plans["int8"].weights == 2 * matrices - (matrices + matrices // 256 * 5)
    assert lora.weights - plans["int4"].weights == 2 * matrices - (matrices // 2 + matrices // 16)
    assert plans["int4"].needed < plans["int8"].needed < lora.needed
