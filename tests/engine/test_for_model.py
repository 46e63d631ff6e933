"""Which parameters of a model are projected, for the architectures that people train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import subspan.optim as optim


def projected(model: nn.Module, **options) -> set[str]:
    optimizer = optim.for_model(model, "galore", rank=2, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters_of(optimizer) if optimizer.layout_of(p).projected}


def parameters_of(optimizer: optim.SubspaceOptimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def causal_lm(kind: str, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **config)
    )


def test_llama_projects_exactly_the_linear_layers_of_its_blocks():
    model = causal_lm(
        "llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    expected = {name for name, _ in model.named_parameters() if "_proj.weight" in name}
    assert len(expected) == 14
    assert projected(model) == expected


def test_gpt2_projects_its_transposed_linear_layers_and_not_the_tied_head():
    model = causal_lm("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    names = projected(model)
    assert names == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_convolutions_are_projected_and_norms_and_classifier_are_not():
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 8, 3))
    model.add_module("bn", nn.BatchNorm2d(8))
    model.add_module("fc", nn.Linear(8, 8))
    model.add_module("classifier", nn.Linear(8, 4))
    assert projected(model) == {"conv.weight", "fc.weight"}


def test_packed_attention_projection_is_projected():
    assert projected(nn.MultiheadAttention(8, 2)) == {"in_proj_weight", "out_proj.weight"}


def test_linear_layer_that_shares_an_embedding_is_not_projected():
    model = nn.Module()
    model.tokens = nn.Embedding(10, 8)
    model.out = nn.Linear(8, 10, bias=False)
    model.out.weight = model.tokens.weight
    model.inner = nn.Linear(8, 8)
    assert projected(model) == {"inner.weight"}


def test_three_dimensional_weights_are_projected_as_stacks_of_experts():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up = nn.Parameter(torch.randn(4, 8, 12))
    optimizer = optim.for_model(model, "galore", rank=2, finder="svd")
    weight = model.experts.gate_up
    assert optimizer.layout_of(weight).view == (4, 8, 12)
    loop = [nn.Parameter(matrix.clone()) for matrix in weight.detach()]
    single = optim.GaLore(loop, rank=2, finder="svd")
    for step in range(3):
        gradient = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(step))
        gradient[3] *= step > 1  # an expert that sees no token at first
        weight.grad = gradient
        for matrix, part in zip(loop, gradient, strict=True):
            matrix.grad = part.clone()
        optimizer.step()
        single.step()
    torch.testing.assert_close(weight.detach()[:3], torch.stack(loop).detach()[:3])


def test_patterns_choose_and_exclude_by_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    assert projected(model) == {"a.weight", "b.weight"}
    assert projected(model, project=r"lm_head|^a") == {"a.weight", "lm_head.weight"}
    assert projected(model, exclude="^b") == {"a.weight"}


@pytest.mark.parametrize("argument", ["project", "exclude"])
def test_pattern_that_matches_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}='Linear' matches no trainable parameter"):
        optim.for_model(nn.ModuleDict({"a": nn.Linear(4, 4)}), **{argument: "Linear"})
    with pytest.raises(ValueError, match="regular expression"):
        optim.for_model(nn.ModuleDict({"a": nn.Linear(4, 4)}), **{argument: "("})


def test_model_without_trainable_parameters_is_refused():
    model = nn.Linear(4, 4)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing can be trained"):
        optim.for_model(model)


def test_model_without_a_matrix_to_project_is_trained_plainly():
    model = nn.LayerNorm(4)
    optimizer = optim.for_model(model, "galore")
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert not any(optimizer.layout_of(p).projected for p in model.parameters())


def test_plain_learning_rate_applies_to_what_is_not_projected():
    model = nn.Linear(4, 4)
    optimizer = optim.for_model(model, "galore", lr=0.1, plain_lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_building_prints_nothing(capsys):
    optim.for_model(nn.Linear(4, 4), "fira")
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_names_decide_in_a_plain_list_and_an_explicit_rank_overrides_them():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "proj": nn.Linear(4, 4)})
    optimizer = optim.GaLore(model.named_parameters(), rank=2)
    assert not optimizer.layout_of(model["embed"].weight).projected
    assert optimizer.layout_of(model["proj"].weight).projected
    explicit = optim.GaLore([{"params": list(model.named_parameters()), "rank": 2}])
    assert explicit.layout_of(model["embed"].weight).projected
    plain = optim.GaLore([{"params": list(model.named_parameters()), "rank": None}])
    assert not plain.layout_of(model["proj"].weight).projected


def test_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'galore'"):
        optim.build("galor", [nn.Parameter(torch.ones(2, 2))])
    assert optim.lookup("APOLLO-Mini").name == "apollo_mini"
