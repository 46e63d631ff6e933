"""Named sizes, and configurations of transformers, as models."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspan.train.errors import JobError, one_line
from subspan.train.model import SIZES

if TYPE_CHECKING:
    from torch import nn

    from subspan.plan.model import ModelSpec

# Sizes that are planned but too large for `subspan train` on one machine: hidden, intermediate,
# heads, heads of keys and values, blocks (Touvron et al.: Llama 2, 2023, arXiv 2307.09288).
LARGE = {
    "llama-13b": (5120, 13824, 40, 40, 40),
    "llama-70b": (8192, 28672, 64, 8, 80),
}
VOCABULARY = {"nano": 4096, "micro": 4096}
"""Of named sizes, where it is not the 32 000 tokens of LLaMA."""

_HEADS = {
    "ForCausalLM": "CausalLM",
    "LMHeadModel": "CausalLM",
    "ForMaskedLM": "MaskedLM",
    "ForSequenceClassification": "SequenceClassification",
    "ForTokenClassification": "TokenClassification",
    "ForImageClassification": "ImageClassification",
}
_FALLBACKS = (
    ("CausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("Seq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("MaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
    ("SpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    ("ImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("ImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
)


def named_size(source: str) -> str | None:
    """The registered name of a size: "7b", "LLaMA-7B" and "llama_7b" are "llama-7b"."""
    text = source.strip().lower().replace("_", "-")
    found = re.fullmatch(r"(?:llama-?)?(\d+[mb])", text)
    name = f"llama-{found[1]}" if found else text
    return name if name in SIZES or name in LARGE else None


def read_config(spec: ModelSpec, size: str | None) -> Any:
    """The configuration of transformers, without caches, fitting the sequence length."""
    from transformers import CONFIG_MAPPING

    if size is not None:
        config = _llama(size, spec)
    else:
        path = Path(spec.source)
        path = path / "config.json" if path.is_dir() else path
        values = _load_json(path)
        kind = values.get("model_type")
        if kind not in CONFIG_MAPPING:
            import transformers

            raise JobError(
                f"{path}: transformers {transformers.__version__} cannot build model_type {kind!r}"
            )
        config = CONFIG_MAPPING[kind].from_dict(values)
        if spec.vocab_size is not None:
            config.get_text_config().vocab_size = spec.vocab_size
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < spec.sequence_length:
        raise JobError(
            f"--sequence-length {spec.sequence_length} exceeds the {positions} positions of "
            f"{spec.source}"
        )
    config.use_cache = text.use_cache = False
    return config


def _load_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JobError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise JobError(f"{path} is no configuration of transformers: it has no model_type")
    return values


def _llama(size: str, spec: ModelSpec) -> Any:
    from transformers import LlamaConfig

    if size in LARGE:
        hidden, intermediate, heads, shared, layers = LARGE[size]
    else:
        shape = SIZES[size]
        hidden, intermediate, layers = shape.hidden, shape.intermediate, shape.layers
        heads = shared = shape.heads
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=layers,
        max_position_embeddings=max(1024, spec.sequence_length),
        vocab_size=spec.vocab_size or VOCABULARY.get(size, 32000),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def from_config(config: Any, spec: ModelSpec, dtype: Any) -> nn.Module:
    """The model of a transformers configuration, with its head, on the device in force."""
    import transformers

    implementation = {"auto": None, "flash": "sdpa"}.get(spec.attention, spec.attention)
    chosen = f"AutoModelFor{_head(config)}" if _head(config) else "AutoModel"
    options: dict[str, Any] = {"dtype": dtype}
    if implementation is not None:
        options["attn_implementation"] = implementation
    built: nn.Module = getattr(transformers, chosen).from_config(config, **options)
    return built


def _head(config: Any) -> str | None:
    """The suffix of the Auto class that builds the configured architecture with its head."""
    import transformers

    mapped = [head for head, name in _FALLBACKS if type(config) in getattr(transformers, name, {})]
    if config.is_encoder_decoder:  # whose decoders alone are causal models, too
        mapped.sort(key=lambda head: not head.endswith(("Seq2SeqLM", "SpeechSeq2Seq")))
    for architecture in config.architectures or ():
        for ending, head in _HEADS.items():
            if architecture.endswith(ending) and (head in mapped or head not in dict(_FALLBACKS)):
                return head
    return mapped[0] if mapped else None


@contextmanager
def quietly() -> Iterator[None]:
    """Without the remarks and warnings of models."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
