"""The command that trains what was planned."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from subspan.plan.configs import LARGE, VOCABULARY
from subspan.plan.model import ModelSpec, meta_model
from subspan.plan.settings import Settings
from subspan.train.config import TrainConfig
from subspan.train.model import SIZES, has_weights

# Options that are flags of their own.
_FLAGS = ("lr", "rank", "update_proj_gap", "scale", "plain_lr", "weight_decay", "seed")


def train_command(settings: Settings) -> tuple[str, list[str]]:
    """The `subspan train` command, and what it cannot say.

    Returns:
        (command, remarks): what has to be done by other means.
    """
    model, remarks = settings.model, list[str]()
    launch = ["torchrun", "--nproc-per-node", str(settings.ranks), "-m"]
    words = [*(launch if settings.ranks > 1 else ()), "subspan", "train", *_model(model, remarks)]
    words += ["--method", settings.method, "--dtype", model.dtype]
    words += ["--sequence-length", str(model.sequence_length)]
    # A plan is of one rank, a run's batch is that of all of them.
    words += ["--batch-size", str(settings.batch_size * settings.ranks)]
    if settings.accumulation != 1:
        words += ["--accumulation", str(settings.accumulation)]
    words += _options(settings)
    if settings.clip != 1.0:
        words += ["--clip", f"{settings.clip:g}"]
    if settings.update_in_backward:
        words += ["--update-in-backward", "--clipping", settings.clipping]
    if model.int8_weights:
        words.append("--int8-weights")
    if settings.checkpointing == "full":
        words.append("--activation-checkpointing")
    if model.attention != "auto":
        remarks.append(
            f"attention {model.attention} is no flag of `subspan train`: use attn_implementation "
            "of the model"
        )
    if model.adapter is not None:
        remarks.append("adapters need a script of your own: peft.get_peft_model, SubspanTrainer")
    return shlex.join(words), remarks


def _model(spec: ModelSpec, remarks: list[str]) -> list[str]:
    """The model, with the vocabulary that was planned."""
    source = spec.source
    if source in SIZES:
        vocabulary = spec.vocab_size or VOCABULARY.get(source, 32000)
        return ["--model", source, "--vocab-size", str(vocabulary)]
    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        why = "is a size of plan alone" if source in LARGE else "is no folder"
        remarks.append(f"{source} {why}: for `subspan train` name a folder with its config.json")
        return ["--model", source]
    words = ["--model", str(folder)]
    if (folder / "tokenizer.json").is_file():
        return words if has_weights(str(folder)) else [*words, "--tokenizer", str(folder)]
    config: Any = meta_model(spec).module.config
    return [*words, "--vocab-size", str(config.get_text_config().vocab_size)]


def _options(settings: Settings) -> list[str]:
    words: list[str] = []
    for name, value in settings.options.items():
        if name in _FLAGS:
            words += [f"--{name.replace('_', '-')}", str(value)]
        else:
            field = name if name in TrainConfig.model_fields else f"method_options.{name}"
            words += ["--set", f"{field}={_yaml(value)}"]
    return words


def _yaml(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", value)
    return value if plain else json.dumps(value)
