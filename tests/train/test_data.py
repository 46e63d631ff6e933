"""Split, tokenizer, cache and packing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from subspan.train import data as data_module
from subspan.train.config import DataConfig, TrainConfig
from subspan.train.data import hash_documents, prepare_data, split_documents
from subspan.train.errors import JobError
from subspan.train.packing import PackedSequences, pack, training_order
from subspan.train.tokenizer import load_tokenizer, train_tokenizer

DOCUMENTS = [f"document number {i}" for i in range(400)]


def test_split_does_not_depend_on_other_documents() -> None:
    train, held_out = split_documents(DOCUMENTS, 0.1)
    more_train, more_held_out = split_documents([*DOCUMENTS[::-1], "one more"], 0.1)
    assert set(train) <= set(more_train)
    assert set(held_out) <= set(more_held_out)
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert 20 <= len(held_out) <= 60


@pytest.mark.parametrize("share", [1e-9, 0.999999999])
def test_both_sides_of_a_split_hold_a_document(share: float) -> None:
    train, held_out = split_documents(DOCUMENTS[:3], share)
    assert train
    assert held_out


def test_single_document_cannot_be_split() -> None:
    with pytest.raises(JobError, match="single document"):
        split_documents(["all there is"], 0.5)


def test_corpus_hash_sees_order_and_borders() -> None:
    hashes = [hash_documents(d) for d in (["ab", "c"], ["a", "bc"], ["c", "ab"])]
    assert len(set(hashes)) == 3


def test_training_a_tokenizer_twice_gives_the_same(text: Path) -> None:
    words = text.read_text()
    first, second = (train_tokenizer([words], 320) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 320


def test_trained_tokenizer_encodes_any_text_without_loss() -> None:
    tokenizer = train_tokenizer(["plain words only"], 300)
    for text in ("naïve ☃ 文字", " two  spaces\tand\nlines ", "\x00"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_cached_text_equals_fresh_text(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data={"cache": str(tmp_path / "cache")}).data
    fresh = prepare_data(config)
    monkeypatch.setattr(data_module, "_tokenise", None)  # A second call would fail.
    again = prepare_data(config)
    np.testing.assert_array_equal(fresh.train, again.train)
    np.testing.assert_array_equal(fresh.validation, again.validation)
    assert fresh.corpus_hash == again.corpus_hash
    assert fresh.tokenizer.get_vocab() == again.tokenizer.get_vocab()


def test_cached_built_in_corpus_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(corpus="pydoc-topics", vocab_size=300, cache=str(tmp_path))
    fresh = prepare_data(config)
    monkeypatch.setattr(data_module, "read_corpus", None)
    assert prepare_data(config).corpus_hash == fresh.corpus_hash


def test_interrupted_tokenising_leaves_nothing_in_the_cache(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data={"cache": str(tmp_path / "cache")}).data

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space"):
        prepare_data(config)
    assert list((tmp_path / "cache" / "tokenised").iterdir()) == []


def test_held_out_documents_are_not_in_the_training_tokens(
    settings: Callable[..., TrainConfig],
) -> None:
    prepared = prepare_data(settings().data)
    end = prepared.tokenizer.eos_token_id
    assert np.count_nonzero(np.asarray(prepared.train) == end) == prepared.documents[0]
    assert np.count_nonzero(np.asarray(prepared.validation) == end) == prepared.documents[1]
    text = prepared.tokenizer.decode(prepared.train)
    held_out = prepared.tokenizer.decode(prepared.validation[:400])
    assert held_out not in text


def test_local_tokenizer_is_used_as_it_is(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train_tokenizer(["some other words"], 280).save_pretrained(tmp_path / "mine")
    prepared = prepare_data(settings(data={"tokenizer": str(tmp_path / "mine")}).data)
    mine = load_tokenizer(tmp_path / "mine")
    assert prepared.tokenizer.get_vocab() == mine.get_vocab()


def test_missing_and_broken_tokenizers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(JobError, match="no usable tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_every_pass_over_the_text_is_another_permutation() -> None:
    order = training_order(10, 25, seed=0)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert list(order[:10]) != list(order[10:20])
    assert list(order) == list(training_order(10, 25, seed=0))
    assert list(order) != list(training_order(10, 25, seed=1))


def test_packed_sequences_are_cuts_of_the_tokens() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    item = PackedSequences(tokens, 8, np.array([3, 0]))[0]
    assert item["input_ids"].tolist() == list(range(24, 32))
    assert item["labels"].tolist() == item["input_ids"].tolist()


def test_too_little_text_says_how_many_tokens_there_are_and_are_needed(
    settings: Callable[..., TrainConfig],
) -> None:
    config = settings(batch_size=512, accumulation=100)
    prepared = prepare_data(config.data)
    with pytest.raises(JobError) as error:
        pack(prepared, config)
    assert f"{len(prepared.train):,} training tokens, one batch needs 1,638,400" in str(error.value)
    assert "batch_size 512 x accumulation 100 x sequence_length 32" in str(error.value)


def test_too_little_held_out_text_is_one_line(settings: Callable[..., TrainConfig]) -> None:
    config = settings(data={"sequence_length": 8192}, batch_size=1)
    with pytest.raises(JobError, match="held-out tokens, one sequence needs 8,192"):
        pack(prepare_data(config.data), config)
