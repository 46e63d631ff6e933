"""Small models as folders with a config.json, and the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from subspan import cli

COMMON = {"vocab_size": 500, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
WIDTHS = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of the configuration of a small model, by family and number of blocks."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str = "llama", blocks: int = 3) -> Path:
        place = root / f"{family}-{blocks}"
        if not place.is_dir():
            config = {
                "llama": lambda: LlamaConfig(num_hidden_layers=blocks, **WIDTHS, **COMMON),
                "qwen": lambda: Qwen2Config(
                    num_hidden_layers=blocks, num_key_value_heads=2, **WIDTHS, **COMMON
                ),
                "gpt2": lambda: GPT2Config(n_embd=64, n_layer=blocks, n_head=4, **COMMON),
            }[family]()
            config.save_pretrained(place)
        return place

    return make


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `subspan plan` in this process; returns status, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["subspan", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call
