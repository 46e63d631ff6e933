"""LLaMA-style models by name, and any local Hugging Face causal language model.

The sizes `llama-60m` to `llama-7b` are those of the GaLore pre-training protocol (Zhao et al.,
"GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024). `nano` and `micro`
are for processors: with 4 096 tokens of vocabulary they have 1.2 and 5.3 million parameters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspan.train.errors import JobError, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LlamaSize:
    """Shape of a LLaMA: width, width of the gated MLP, attention heads, blocks."""

    hidden: int
    intermediate: int
    heads: int
    layers: int


SIZES = {
    "nano": LlamaSize(96, 256, 4, 4),
    "micro": LlamaSize(256, 688, 4, 4),
    "llama-60m": LlamaSize(512, 1376, 8, 8),
    "llama-130m": LlamaSize(768, 2048, 12, 12),
    "llama-350m": LlamaSize(1024, 2736, 16, 24),
    "llama-1b": LlamaSize(2048, 5461, 32, 24),
    "llama-7b": LlamaSize(4096, 11008, 32, 32),
}

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def check_model_name(model: str) -> None:
    """Refuse what is neither a named size nor a folder with a config.json.

    Raises:
        JobError: naming the model and what is allowed.
    """
    if model in SIZES:
        return
    if not Path(model).is_dir():
        known = ", ".join(SIZES)
        raise JobError(
            f"unknown model {model!r}: not a folder, and not one of the named sizes {known}"
        )
    if not (Path(model) / "config.json").is_file():
        raise JobError(
            f"model folder {model} has no config.json; save a model there or name a size"
        )


def has_weights(model: str) -> bool:
    """Whether `model` is a folder that holds weights (not only a configuration)."""
    return model not in SIZES and any((Path(model) / name).is_file() for name in _WEIGHTS)


def build_model(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    sequence_length: int,
    dtype: str = "float32",
) -> PreTrainedModel:
    """Causal language model with the vocabulary of `tokenizer`.

    A named size or a folder with only a config.json is initialised from `seed`, independently of
    any other use of the random generators. A folder with weights keeps them; when the tokenizer
    has more tokens than the model, the embeddings are extended.

    Args:
        model: named size or local folder.
        tokenizer: decides vocabulary and special tokens.
        seed: of the initial weights.
        sequence_length: tokens; must fit the model's positions.
        dtype: of the weights, `float32` or `bfloat16`.

    Raises:
        JobError: unknown name, unreadable folder, or sequences longer than the model's positions.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_model_name(model)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if has_weights(model):
                built = AutoModelForCausalLM.from_pretrained(
                    model, dtype=kind, local_files_only=True
                )
                if len(tokenizer) > built.get_input_embeddings().weight.shape[0]:
                    built.resize_token_embeddings(len(tokenizer))
            else:
                config = _fresh_config(model, tokenizer, sequence_length)
                built = AutoModelForCausalLM.from_config(config, dtype=kind)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise JobError(f"cannot build model {model}: {one_line(error)}") from None
    positions = getattr(built.config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise JobError(
            f"data.sequence_length={sequence_length} exceeds the {positions} positions of {model}"
        )
    built.config.use_cache = False
    return built


def _fresh_config(model: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Any:
    from transformers import AutoConfig, LlamaConfig

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model not in SIZES:
        return AutoConfig.from_pretrained(model, local_files_only=True, **special)
    size = SIZES[model]
    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        num_hidden_layers=size.layers,
        max_position_embeddings=max(1024, sequence_length),
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        hidden_act="silu",
        tie_word_embeddings=False,
        **special,
    )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters, in the order of names."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()
