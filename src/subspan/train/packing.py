"""Fixed-length sequences over a long array of tokens, in an order fixed by a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from subspan.train.config import TrainConfig
from subspan.train.data import PreparedData, Tokens
from subspan.train.errors import JobError


class PackedSequences(Dataset[dict[str, torch.Tensor]]):
    """Sequences of `length` tokens; item i is the sequence number `order[i]`.

    Labels equal the inputs: causal language models shift them.
    """

    def __init__(self, tokens: Tokens, length: int, order: npt.NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.length = length
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.order[index]) * self.length
        sequence = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": sequence, "labels": sequence}


def training_order(sequences: int, needed: int, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of `needed` sequences: one permutation of all for every pass over the text.

    The order depends on the arguments alone, not on the state of any random generator, so every
    method sees the same batches and a resumed run goes on where it stopped.
    """
    passes = -(-needed // sequences)
    orders = [np.random.default_rng([seed, i]).permutation(sequences) for i in range(passes)]
    return np.concatenate(orders)[:needed]


def pack(data: PreparedData, config: TrainConfig) -> tuple[PackedSequences, PackedSequences]:
    """Training sequences of the whole run in their order, and the validation sequences.

    Raises:
        JobError: too little text for one batch or for one validation sequence.
    """
    length = config.data.sequence_length
    needed = config.tokens_per_step
    corpus = config.data.corpus
    if len(data.train) < needed:
        raise JobError(
            f"too little text: corpus {corpus} has {len(data.train):,} training tokens, one batch "
            f"needs {needed:,} (batch_size {config.batch_size} x accumulation "
            f"{config.accumulation} x sequence_length {length}); give more text or lower these"
        )
    if len(data.validation) < length:
        raise JobError(
            f"too little text: corpus {corpus} has {len(data.validation):,} held-out tokens, one "
            f"sequence needs {length:,}; give more text or raise data.validation_share"
        )
    order = training_order(
        len(data.train) // length,
        config.total_steps * config.batch_size * config.accumulation,
        config.seed,
    )
    held_out = len(data.validation) // length
    wanted = min(held_out, max(1, config.data.validation_tokens // length))
    spaced = np.arange(wanted, dtype=np.int64) * held_out // wanted
    return (
        PackedSequences(data.train, length, order),
        PackedSequences(data.validation, length, spaced),
    )
