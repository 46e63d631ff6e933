"""Memory of a forward and backward pass, from running them on tensors without memory.

No formula knows an architecture: the model's own code runs, on fake tensors (see `timeline`), and
its operators say what they return and autograd what it keeps. That counts to the byte what
PyTorch hands out in eager mode; what a kernel needs inside, and what an allocator rounds up or
fragments, is not in it, hence an estimate. Equal blocks are run at two depths and extrapolated.

Attention "flash" is planned as "sdpa", whose fused kernels keep the same: queries, keys, values,
the output and a float32 per head and token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from subspan.optim.resting import is_trainable
from subspan.optim.rowwise import RowwiseUpdates
from subspan.plan.blocks import Run, longest_run
from subspan.plan.fake import held_tensors, make_fake, no_log, no_packing
from subspan.plan.inputs import MakeInputs, loss_of
from subspan.plan.timeline import Moment, Timeline, Window


@dataclass(frozen=True)
class Passes:
    """Bytes of one forward and backward pass above weights and optimizer states.

    Args:
        saved: what autograd keeps when the forward pass ends.
        kept: the fullest moment when gradients stay until the step.
        freed: the same when each gradient is freed as soon as it is there.
        arrivals: then the most bytes when a gradient of some shape has arrived.
        blocks: equal blocks that were run, instead of all; None if all were.
    """

    saved: int
    kept: Moment
    freed: Moment
    arrivals: Mapping[tuple[int, ...], int]
    blocks: int | None = None


def run_passes(
    model: nn.Module,
    make_inputs: MakeInputs,
    batch_size: int,
    sequence_length: int,
    *,
    checkpointing: bool = False,
    mixed: bool = False,
    extrapolate: bool = True,
    by_rows: Collection[str] = (),
    resting: Collection[str] = (),
) -> Passes:
    """Run one forward and backward pass of a model and note what is allocated.

    Args:
        model: on the meta device; not changed.
        make_inputs: makes the inputs.
        batch_size: sequences of the pass.
        sequence_length: tokens of a sequence.
        checkpointing: recompute every block in the backward pass.
        mixed: under bfloat16 autocast.
        extrapolate: run few of many equal blocks.
        by_rows: names of embeddings and output layers whose gradients are made and used in blocks
            of rows (`subspan.optim.rowwise`).
        resting: names of trainable parameters that need no gradient in this pass.

    Raises:
        Exception: whatever the model's code raises where it needs values.
    """

    def record(whole: Run | None, count: int) -> _Record:
        with whole.shortened(model, count) if whole is not None else nullcontext() as depth:
            shadow = copy.deepcopy(model)
        with FakeTensorMode(), no_packing(), no_log("torch._subclasses.fake_tensor"):
            make_fake(shadow)
            inputs = make_inputs(batch_size, sequence_length)
            return _record(shadow, inputs, depth, checkpointing, mixed, by_rows)

    with _at_rest(model, resting):
        return _run_passes(model, record, extrapolate)


def _run_passes(
    model: nn.Module, record: Callable[[Run | None, int], _Record], extrapolate: bool
) -> Passes:
    run = longest_run(model) if extrapolate else None
    lengths = run.lengths() if run is not None else None
    if run is not None and lengths is not None:
        try:
            short, longer = (record(run, count) for count in lengths)
        except Exception:  # Code that counts its blocks by the configuration, for one.
            lengths = None
        else:
            if len(short.windows) == lengths[0] + 1 and len(longer.windows) == lengths[1] + 1:
                return _extrapolate(short, longer, lengths, run.count)
    full = record(None, 0)
    return _passes(full.saved, full.windows, None)


@dataclass(frozen=True)
class _Record:
    saved: int
    windows: list[Window]


def _record(
    model: nn.Module,
    inputs: Any,
    run: Run | None,
    checkpointing: bool,
    mixed: bool,
    by_rows: Collection[str],
) -> _Record:
    """The pass itself; with a run, a window for the forward pass and one per block, last first."""
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    tensors = [*model.parameters(), *model.buffers(), *inputs.values()]
    timeline = Timeline(t for tensor in tensors for t in held_tensors(tensor))
    forward = [True]

    def arrived(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # It is, where gradients come in blocks of rows.
            timeline.arrived(parameter.grad)
            parameter.grad = None

    def leaves(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if forward[0] and isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda gradient: timeline.enter())

    if by_rows:
        _Rows(model, by_rows).attach(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)
    if run is not None:
        for block in run.blocks(model):
            block.register_forward_hook(leaves)
    with timeline:
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            loss = loss_of(model(**inputs))
        forward[0] = False
        saved = timeline.alive
        loss.backward()
    return _Record(saved, timeline.windows)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute the blocks of a transformers model in the backward pass, as its Trainer does.

    Raises:
        ValueError: the model cannot.
    """
    supported = bool(getattr(model, "supports_gradient_checkpointing", True))
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # of transformers 5, 4
        enable: Any = getattr(model, f"{name}_enable", None)
        if enable is not None and supported:
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            return
    raise ValueError(f"{type(model).__name__} has no activation checkpointing")


def _extrapolate(short: _Record, longer: _Record, lengths: tuple[int, int], count: int) -> Passes:
    """What `count` blocks need. At a fixed place from either end every number is linear in it."""
    steps = (count - lengths[0]) // (lengths[1] - lengths[0])

    def at(a: int, b: int) -> int:
        return a + steps * (b - a)

    def moment(a: Moment, b: Moment) -> Moment:
        return Moment(at(a.total, b.total), at(a.gradients, b.gradients))

    front = 1 + (lengths[0] + 1) // 2
    back = len(short.windows) - front
    places = [*range(front), *range(-back, 0)]
    windows = [
        Window(
            moment(a.kept, b.kept),
            moment(a.freed, b.freed),
            {shape: at(size, b.arrivals.get(shape, size)) for shape, size in a.arrivals.items()},
        )
        for a, b in ((short.windows[place], longer.windows[place]) for place in places)
    ]
    return _passes(at(short.saved, longer.saved), windows, sum(lengths))


def _passes(saved: int, windows: list[Window], blocks: int | None) -> Passes:
    kept = max((window.kept for window in windows), key=lambda moment: moment.total)
    freed = max((window.freed for window in windows), key=lambda moment: moment.total)
    arrivals: dict[tuple[int, ...], int] = {}
    for window in windows:
        for shape, size in window.arrivals.items():
            arrivals[shape] = max(arrivals.get(shape, 0), size)
    return Passes(saved, kept, freed, arrivals, blocks)


class _Rows(RowwiseUpdates):
    """Layers whose gradients come in blocks of rows, as an optimizer would take them over."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._chosen = {id(p) for name, p in model.named_parameters() if name in names}
        self._modules: list[nn.Module] = []

    def _allows(self, weight: Tensor) -> bool:
        return id(weight) in self._chosen

    def update(self, weight: Tensor, rows: Callable[[int, int], Tensor]) -> None:
        # A block has a megabyte; making it needs values of the input (which rows were used).
        pass


@contextmanager
def _at_rest(model: nn.Module, resting: Collection[str]) -> Iterator[None]:
    """Exactly these of a model's trainable parameters rest for the duration of the context.

    An optimizer whose parameters take turns has turned gradients off as its first period asks.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if is_trainable(p)]
    before = [parameter.requires_grad for _, parameter in trainable]
    for name, parameter in trainable:
        parameter.requires_grad_(name not in resting)
    try:
        yield
    finally:
        for (_, parameter), needed in zip(trainable, before, strict=True):
            parameter.requires_grad_(needed)
