"""A byte-level BPE tokenizer trained on the spot, or any local one in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from subspan.train.errors import JobError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"

_LONGEST = 1 << 30


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`; it can encode any text without unknown tokens.

    The 256 bytes and one end-of-text token are always there. A text too small for `vocab_size`
    gives fewer tokens: merges of pairs that occur only once are not made.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    # One token ends every document, so it serves as beginning, end and padding alike.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=_LONGEST,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder.

    Raises:
        JobError: there is none, it cannot be read, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise JobError(f"tokenizer folder {folder} does not exist; save a tokenizer there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"no usable tokenizer in {folder}: {one_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise JobError(
            f"the tokenizer in {folder} has no end-of-text token; set eos_token in its files"
        )
    # Packed sequences are never cut by the tokenizer, so its length warning would be wrong.
    tokenizer.model_max_length = _LONGEST
    return tokenizer
