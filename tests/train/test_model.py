"""Models: named sizes, folders with and without weights, seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subspan.train.errors import JobError
from subspan.train.model import SIZES, build_model, weights_hash
from subspan.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to begin with"], 300)


def test_sizes_have_the_element_counts_of_the_protocol() -> None:
    # Projected and other elements in millions with a vocabulary of 32 000, as published.
    expected = {
        "llama-60m": (25.30, 32.78),
        "llama-130m": (84.93, 49.17),
        "llama-350m": (302.4, 65.6),
        "llama-1b": (1207.9, 131.2),
        "llama-7b": (6476, 262),
    }
    for name, (projected, other) in expected.items():
        size = SIZES[name]
        block = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate
        rest = 2 * 32_000 * size.hidden + (2 * size.layers + 1) * size.hidden
        assert size.layers * block / 1e6 == pytest.approx(projected, rel=1e-3)
        assert rest / 1e6 == pytest.approx(other, rel=2e-3)


def test_named_size_follows_protocol_and_tokenizer(tokenizer) -> None:
    model = build_model("nano", tokenizer, seed=0, sequence_length=64)
    config = model.config
    assert config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    assert (config.rms_norm_eps, config.initializer_range) == (1e-6, 0.02)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_initial_weights_depend_on_the_seed_alone(tokenizer) -> None:
    first = build_model("nano", tokenizer, seed=1, sequence_length=64)
    torch.rand(7)
    before = torch.get_rng_state()
    second = build_model("nano", tokenizer, seed=1, sequence_length=64)
    assert torch.equal(before, torch.get_rng_state())
    assert weights_hash(first) == weights_hash(second)
    third = build_model("nano", tokenizer, seed=2, sequence_length=64)
    assert weights_hash(first) != weights_hash(third)


def test_folder_with_weights_keeps_them(tokenizer, tmp_path: Path) -> None:
    first = build_model("nano", tokenizer, seed=1, sequence_length=64)
    first.save_pretrained(tmp_path)
    again = build_model(str(tmp_path), tokenizer, seed=9, sequence_length=64)
    assert weights_hash(first) == weights_hash(again)


def test_embeddings_grow_with_a_larger_tokenizer(tokenizer, tmp_path: Path) -> None:
    build_model("nano", tokenizer, seed=1, sequence_length=64).save_pretrained(tmp_path)
    tokenizer = train_tokenizer(["some words to begin with, and more words to end with"], 300)
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    grown = build_model(str(tmp_path), tokenizer, seed=1, sequence_length=64)
    assert grown.lm_head.weight.shape[0] == len(tokenizer)


def test_folder_with_only_a_configuration_is_initialised(tokenizer, tiny: Path) -> None:
    model = build_model(str(tiny), tokenizer, seed=0, sequence_length=64, dtype="bfloat16")
    assert model.config.hidden_size == 32
    assert model.config.vocab_size == len(tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_models_are_one_line(tokenizer, tiny: Path, tmp_path: Path) -> None:
    cases = {
        "llama-2b": "unknown model 'llama-2b': not a folder, and not one of the named sizes nano",
        str(tmp_path): "has no config.json",
    }
    for name, message in cases.items():
        with pytest.raises(JobError) as error:
            build_model(name, tokenizer, seed=0, sequence_length=64)
        assert message in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(JobError, match="cannot build model") as error:
        build_model(str(tmp_path), tokenizer, seed=0, sequence_length=64)
    assert "\n" not in str(error.value)
    with pytest.raises(JobError, match="sequence_length=129 exceeds the 128 positions"):
        build_model(str(tiny), tokenizer, seed=0, sequence_length=129)
