"""A batch of made-up inputs for a model, and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
MakeInputs = Callable[[int, int], Inputs]
"""(batch size, sequence length) -> keyword arguments of the model's forward."""

_PER_SEQUENCE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
_PER_TOKEN = (
    "ForCausalLM",
    "LMHeadModel",
    "LMHead",
    "ForMaskedLM",
    "ForConditionalGeneration",
    "ForTokenClassification",
)


def example_inputs(model: nn.Module, batch_size: int, sequence_length: int) -> Inputs:
    """Random inputs of the kind that a transformers model reads, with labels where it takes them.

    Args:
        model: of transformers.
        batch_size: sequences, images or recordings.
        sequence_length: tokens of a sequence; images and recordings have the configured size.

    Raises:
        ValueError: inputs of the model's kind are not known.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        raise ValueError(f"inputs of {type(model).__name__} are not known")
    first = _main_input(name, config, batch_size, sequence_length)
    inputs = {name: first.to(_dtype(model)) if first.is_floating_point() else first}
    taken = inspect.signature(_inner(model).forward).parameters
    takes_labels = "labels" in taken
    kind = type(_inner(model)).__name__
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = _tokens(config, batch_size, sequence_length)
    if takes_labels and kind.endswith(_PER_SEQUENCE):
        inputs["labels"] = torch.zeros(batch_size, dtype=torch.long)
    elif takes_labels and kind.endswith(_PER_TOKEN):
        inputs["labels"] = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    return inputs


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model that adapters are attached to."""
    base: Any = getattr(model, "get_base_model", None)
    return base() if base is not None else model


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in _inner(model).parameters() if p.is_floating_point()), torch.float)


def _main_input(name: str, config: Any, batch_size: int, sequence_length: int) -> Tensor:
    if name == "input_ids":
        return _tokens(config, batch_size, sequence_length)
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.zeros(batch_size, getattr(vision, "num_channels", 3), height, width)
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return torch.zeros(batch_size, config.num_mel_bins, 2 * config.max_source_positions)
    raise ValueError(f"inputs called {name} are not known")


def _tokens(config: Any, batch_size: int, sequence_length: int) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return torch.randint(0, text.vocab_size, (batch_size, sequence_length))


def loss_of(outputs: Any) -> Tensor:
    """The loss of a model's outputs; where it has none, the sum of its first output."""
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    first = outputs
    while not isinstance(first, Tensor):
        first = first[0]
    return first.float().sum()
