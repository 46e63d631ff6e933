"""A text of about 200 kB, a model of two blocks of width 32, and the settings of a short run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspan.train.config import TrainConfig, parse
from subspan.train.yamlfile import merge


def write_text(path: Path, characters: int = 200_000) -> Path:
    """English-like paragraphs from a fixed seed."""
    source = random.Random(0)
    words = ["".join(source.choices("etaoinshrdlu", k=source.randint(2, 8))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    parts: list[str] = []
    size = 0
    while size < characters:
        sentence = " ".join(source.choices(words, weights, k=source.randint(4, 14)))
        parts.append(sentence.capitalize() + source.choice([". ", ". ", ".\n\n"]))
        size += len(parts[-1])
    path.write_text("".join(parts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the configuration of a tiny LLaMA and no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(text: Path, cache: Path, tiny: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds the configuration of a run of 12 steps; keywords override."""

    def build(**changes: Any) -> TrainConfig:
        base = {
            "output": str(tmp_path / "run"),
            "model": str(tiny),
            "data": {
                "corpus": str(text),
                "vocab_size": 300,
                "sequence_length": 32,
                "validation_tokens": 512,
                "cache": str(cache),
            },
            "method": "galore",
            "lr": 0.01,
            "rank": 4,
            "update_proj_gap": 5,
            "steps": 12,
            "batch_size": 4,
            "log_every": 3,
            "eval_every": 6,
            "checkpoint_every": 4,
            "device": "cpu",
            "threads": 1,
            "track": [],
        }
        return parse(TrainConfig, merge(base, changes), "test")

    return build
