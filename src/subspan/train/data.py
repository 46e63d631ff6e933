"""From a corpus to packed token sequences: split, tokenizer, cache.

The split is by document: a document is held out when the hash of its text says so, hence the same
document is on the same side in every run, whatever else the corpus holds. Documents are joined
with an end-of-text token between them and cut into sequences of equal length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from subspan.train.config import DataConfig
from subspan.train.corpora import check_corpus, read_corpus, source_key
from subspan.train.errors import JobError
from subspan.train.files import cache_folder, new_folder, write_json
from subspan.train.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of the cache key: raise it when splitting or tokenising changes.
_FORMAT = 1

_DOCUMENTS_AT_ONCE = 256

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class PreparedData:
    """Tokenised text of one corpus.

    Attributes:
        tokenizer: its tokenizer.
        train: token numbers of the training documents, shape (tokens,).
        validation: token numbers of the held-out documents, shape (tokens,).
        corpus_hash: SHA-256 over all documents.
        documents: number of training and of held-out documents.
        characters: characters of all documents.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Tokens
    validation: Tokens
    corpus_hash: str
    documents: tuple[int, int]
    characters: int


def prepare_data(config: DataConfig, *, default_tokenizer: str | None = None) -> PreparedData:
    """Tokenise a corpus, or take it from the cache.

    Args:
        config: corpus, tokenizer and split.
        default_tokenizer: tokenizer folder to use when `config` names none.

    Raises:
        JobError: unknown corpus or tokenizer, unreadable or empty text.
    """
    check_corpus(config.corpus, config.packages)
    folder = config.tokenizer or default_tokenizer
    tokenizer = load_tokenizer(folder) if folder else None
    recipe = _recipe(config, tokenizer)
    cache = cache_folder(config.cache)
    # A built-in corpus is known by its source files, so it need not be parsed again.
    source = source_key(config.corpus, config.packages, config.text_field)
    pointer = cache / "corpora" / f"{source}.json"
    if source is not None and pointer.is_file():
        target = _target(cache, json.loads(pointer.read_text())["corpus_hash"], recipe)
        if target.is_dir():
            return _load(target)
    documents = read_corpus(config.corpus, packages=config.packages, text_field=config.text_field)
    corpus_hash = hash_documents(documents)
    target = _target(cache, corpus_hash, recipe)
    if not target.is_dir():
        _tokenise(target, documents, corpus_hash, config, tokenizer)
    if source is not None:
        write_json(pointer, {"corpus_hash": corpus_hash})
    return _load(target)


def hash_documents(documents: Iterable[str]) -> str:
    """SHA-256 over the documents with their lengths, in order."""
    digest = hashlib.sha256()
    for text in documents:
        raw = text.encode()
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()


def split_documents(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Training and held-out documents, each in the given order.

    A document is held out when its hash, read as a number in [0, 1), is below `share`. When that
    holds out none (or all), the one with the lowest (highest) number changes sides.

    Raises:
        JobError: there are fewer than two documents.
    """
    if len(documents) < 2:
        raise JobError("the corpus is a single document, so none can be held out; give more text")
    places = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8]) / 2**64 for t in documents]
    border = min(max(share, np.nextafter(min(places), 1)), max(places))
    train = [text for text, place in zip(documents, places, strict=True) if place >= border]
    held_out = [text for text, place in zip(documents, places, strict=True) if place < border]
    return train, held_out


def _recipe(config: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        kind = f"bpe {config.vocab_size}"
    else:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
        special = sorted(tokenizer.special_tokens_map.items())
        kind = hashlib.sha256(f"{text} {special}".encode()).hexdigest()
    return f"format {_FORMAT} share {config.validation_share} tokenizer {kind}"


def _target(cache: Path, corpus_hash: str, recipe: str) -> Path:
    key = hashlib.sha256(f"{corpus_hash} {recipe}".encode()).hexdigest()
    return cache / "tokenised" / key


def _tokenise(
    target: Path,
    documents: list[str],
    corpus_hash: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    train, held_out = split_documents(documents, config.validation_share)
    tokenizer = tokenizer or train_tokenizer(train, config.vocab_size)
    with new_folder(target) as folder:
        tokenizer.save_pretrained(folder / "tokenizer")
        np.save(folder / "train.npy", _encode(tokenizer, train))
        np.save(folder / "validation.npy", _encode(tokenizer, held_out))
        about = {
            "corpus_hash": corpus_hash,
            "documents": [len(train), len(held_out)],
            "characters": sum(map(len, documents)),
        }
        write_json(folder / "about.json", about)


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tokens:
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts: list[Tokens] = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        batch = documents[start : start + _DOCUMENTS_AT_ONCE]
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=kind))
    return np.concatenate(parts)


def _load(folder: Path) -> PreparedData:
    about = json.loads((folder / "about.json").read_text())
    train_documents, held_out = about["documents"]
    return PreparedData(
        tokenizer=load_tokenizer(folder / "tokenizer"),
        train=np.load(folder / "train.npy", mmap_mode="r"),
        validation=np.load(folder / "validation.npy", mmap_mode="r"),
        corpus_hash=about["corpus_hash"],
        documents=(train_documents, held_out),
        characters=about["characters"],
    )
