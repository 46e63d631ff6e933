"""A bucket: like parameters of one group, processed as one batch.

They have equal shape, dtype, device and history. Between steps states live per parameter in
`optimizer.state[p]`. For a step a bucket presents them, the gradients and the weights in compute
precision, batched over a leading dimension when there is more than one parameter. A single
parameter whose tensors already are in compute precision is presented as it is, without any copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.parts.storage import Codec
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration

if TYPE_CHECKING:
    from subspan.optim.sharding import Sharding
    from subspan.subspaces.bases import Subspace

BASIS_NAMES = frozenset(("basis", "basis_left", "basis_right", "index"))
Codecs = dict[str, tuple[Codec, StateDeclaration]]

# Draws that one parameter makes in one step, told apart by the purpose mixed into their seeds.
FIND, ROUND_WEIGHT, ROUND_STATE, FOLLOW = 1, 2, 3, 4


@dataclass
class Bucket:
    """See the module.

    Args:
        weights: the parameters, or flat pieces of one.
        gradients: same shapes.
        states: their stored states.
        layouts: their layouts.
        step: 1-based step about to be taken.
        age: steps since the moments started, this one included.
        due: whether a refresh is planned for this step.
        blank: whether it is put off because the gradient is zero.
        codecs: of the states that are held in few bits.
        coordinates: given instead of gradients when they were summed inside the subspace.
        found: the new subspace if it was found before, from more than the bucket holds.
        sharding: sums over all ranks when the bucket holds one rank's piece; else None.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]
    layouts: list[Layout]
    step: int
    age: int
    due: bool = False
    blank: bool = False
    codecs: Codecs = field(default_factory=dict)
    coordinates: list[Tensor] = field(default_factory=list)
    found: Subspace | None = None
    sharding: Sharding | None = None

    @classmethod
    def joined(cls, buckets: Sequence[Bucket]) -> Bucket:
        """Several buckets of alike parameters as one."""
        if len(buckets) == 1:
            return buckets[0]
        lists: dict[str, Any] = {
            name: [item for bucket in buckets for item in getattr(bucket, name)]
            for name in ("weights", "gradients", "states", "layouts", "coordinates")
        }
        return replace(buckets[0], **lists)

    def __post_init__(self) -> None:
        self.layout = self.layouts[0]
        self.device = self.weights[0].device
        self.dtype = linalg.compute_dtype(self.weights[0].dtype)
        self.single = len(self.weights) == 1

    def gather(self, tensors: list[Tensor], work: Workspace) -> Tensor:
        """The tensors in the layout's view and compute precision.

        A view of the only one where possible.
        """
        view = self.layout.view
        if self.single and not is_quantised(tensors[0]):
            tensor = tensors[0].reshape(view)
            if tensor.dtype == self.dtype:
                return (
                    tensor
                    if tensor.is_contiguous() or len(view) < 2
                    else self._copy([tensor], work)
                )
        return self._copy(tensors, work)

    def _copy(self, tensors: list[Tensor], work: Workspace) -> Tensor:
        view = self.layout.view
        batch = work.take((len(tensors), *view), self.dtype, self.device)
        for row, tensor in zip(batch, tensors, strict=True):
            if is_quantised(tensor):
                tensor.dequantise(out=row)  # type: ignore[attr-defined]
            else:
                row.copy_(tensor.reshape(view))
        return batch[0] if self.single else batch

    def owns(self, gathered: Tensor) -> bool:
        """Whether what `gather` returned for the gradients is a copy that may be overwritten."""
        return gathered.data_ptr() != self.gradients[0].data_ptr()

    def load(self) -> dict[str, Any]:
        """The states in compute precision; numbers become lists with one entry per parameter."""
        loaded: dict[str, Any] = {name: self.read(name) for name in self.codecs}
        held = {name + suffix for name in self.codecs for suffix in self._suffixes(name)}
        for name, first in self.states[0].items():
            if name in held:
                continue
            if not isinstance(first, Tensor):
                loaded[name] = [state[name] for state in self.states]
            else:
                stored = (
                    first if self.single else torch.stack([state[name] for state in self.states])
                )
                loaded[name] = stored.to(self.dtype) if stored.is_floating_point() else stored
        return loaded

    def _suffixes(self, name: str) -> list[str]:
        codec, declared = self.codecs[name]
        return list(codec.slots(self.layout.shape(declared.shape)))

    def _held(self, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
        return {suffix: state[name + suffix] for suffix in self._suffixes(name)}

    def read(self, name: str) -> Tensor:
        """A state that is held in few bits, decoded."""
        codec, declared = self.codecs[name]
        shape = self.layout.shape(declared.shape)
        values = [codec.decode(self._held(name, state), shape, self.dtype) for state in self.states]
        return values[0] if self.single else torch.stack(values)

    def keep(self, name: str, value: Tensor) -> None:
        """Encode a state that is held in few bits."""
        codec, _ = self.codecs[name]
        for row, state in enumerate(self.states):
            codec.encode(value if self.single else value[row], self._held(name, state))

    def commit(self, loaded: dict[str, Any], *, bases: bool, seed: int, stochastic: bool) -> None:
        """Write loaded states back where they are not the stored tensors themselves.

        Args:
            loaded: what `load` returned, updated.
            bases: whether the basis changed and has to be written too.
            seed: of the optimizer's group, for stochastic rounding.
            stochastic: round to bf16 at random rather than to nearest (bases are always rounded to
                nearest).
        """
        for name, value in loaded.items():
            is_basis = name in BASIS_NAMES or name.startswith("factor_")
            if is_basis and not bases:
                continue
            if name in self.codecs:
                if not is_basis:  # bases were kept when they were found
                    self.keep(name, value)
                continue
            for row, state in enumerate(self.states):
                stored = state[name]
                if not isinstance(stored, Tensor):
                    state[name] = value[row]
                    continue
                new = value if self.single else value[row]
                if new.data_ptr() != stored.data_ptr() or new.dtype != stored.dtype:
                    draw = (
                        None
                        if is_basis or not stochastic
                        else self._generator(row, seed, ROUND_STATE)
                    )
                    write(stored, new, draw)

    def write_weights(self, values: Tensor, seed: int, stochastic: bool) -> None:
        """Write updated weights back where `gather` had to copy them."""
        for row, weight in enumerate(self.weights):
            new = values if self.single else values[row]
            if is_quantised(weight) or (
                new.data_ptr() != weight.data_ptr() or new.dtype != weight.dtype
            ):
                draw = self._generator(row, seed, ROUND_WEIGHT) if stochastic else None
                write(weight, new.view(weight.shape), draw)

    def seeds(self, seed: int, purpose: int) -> list[int]:
        """One seed per parameter for this step and purpose."""
        return [
            linalg.derive_seed(seed, layout.index, self.step, purpose) for layout in self.layouts
        ]

    def _generator(self, row: int, seed: int, purpose: int) -> torch.Generator:
        drawn = self.seeds(seed, purpose)[row]
        if self.sharding is not None:
            # Pieces of one parameter must not draw the same rounding noise.
            drawn = linalg.derive_seed(drawn, self.sharding.rank)
        return linalg.generator(drawn, self.device)


def write(target: Tensor, value: Tensor, draw: torch.Generator | None) -> None:
    """Copy `value` into `target`.

    Rounds stochastically if the target is bf16 or int8 and a generator is given.
    """
    if is_quantised(target):
        target.quantise_(value.reshape(target.shape), draw)  # type: ignore[attr-defined]
    elif target.dtype == torch.bfloat16 and value.dtype == torch.float32 and draw is not None:
        linalg.stochastic_round_(target, value.reshape(target.shape), draw)
    else:
        target.copy_(value)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is held in few bits (`subspan.layers.QuantisedWeight`)."""
    return hasattr(type(tensor), "quantise_")


def pieces(bucket: Bucket, length: int) -> list[Bucket]:
    """Cut a bucket of one elementwise parameter into flat pieces, to keep temporaries small."""
    weight, gradient, state = bucket.weights[0], bucket.gradients[0], bucket.states[0]
    length = -(-length // _unit(bucket)) * _unit(bucket)
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    flat = all(tensor.is_contiguous() for tensor in (weight, gradient, *tensors))
    size = weight.numel()
    if not flat or size <= length or is_quantised(weight):
        return [bucket]
    starts = range(0, size, length)
    return [
        piece(bucket, number, start, min(start + length, size))
        for number, start in enumerate(starts)
    ]


def piece(
    bucket: Bucket, number: int, start: int, stop: int, gradient: Tensor | None = None
) -> Bucket:
    """The entries start:stop of a bucket of one elementwise parameter, flat.

    States without dimensions are sums over the weight, to which all pieces add.

    Args:
        bucket: all of it.
        number: of the piece; pieces of one parameter must not draw the same rounding noise.
        start: a multiple of the entries that share a scale.
        stop: the same, or the end.
        gradient: of just these entries, if the bucket does not hold it.
    """
    index = linalg.derive_seed(bucket.layout.index, number)
    if gradient is None:
        gradient = bucket.gradients[0].view(-1)[start:stop]
    per = _entries_per_element(bucket)
    sliced = {
        name: value.view(-1)[start // per.get(name, 1) : -(-stop // per.get(name, 1))]
        if isinstance(value, Tensor) and value.dim()
        else value
        for name, value in bucket.states[0].items()
    }
    return replace(
        bucket,
        weights=[bucket.weights[0].view(-1)[start:stop]],
        gradients=[gradient.reshape(-1)],
        states=[sliced],
        layouts=[replace(bucket.layout, view=(stop - start,), index=index)],
    )


def keep_numbers(bucket: Bucket, last: Bucket) -> None:
    """Take over the numbers in the state of the last piece, and the step."""
    numbers = {k: v for k, v in last.states[0].items() if not isinstance(v, Tensor)}
    bucket.states[0].update(numbers, step=bucket.step)


def _unit(bucket: Bucket) -> int:
    """Entries that share a scale."""
    return max((codec.unit for codec, _ in bucket.codecs.values()), default=1)


def _entries_per_element(bucket: Bucket) -> dict[str, int]:
    """Of the tensors that hold a state in few bits, which are shorter than the weight."""
    unit = _unit(bucket)
    return {
        name + suffix: 2 * unit // math.prod(shape)
        for name, (codec, _) in bucket.codecs.items()
        for suffix, (shape, _) in codec.slots((2 * unit,)).items()
    }
