"""Planned activations against what PyTorch really allocates and autograd really saves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from subspan.plan.activations import enable_checkpointing, run_passes
from subspan.plan.model import BuiltModel, ModelSpec, build_model, meta_model

FAMILIES = ("llama", "qwen", "gpt2")
BATCH, LENGTH = 3, 48


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Most bytes, and bytes left, that PyTorch's allocator handed out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = list(itertools.accumulate(size for _, size in changes))
    return max(alive), alive[-1]


def real(spec: ModelSpec, checkpointing: bool) -> tuple[BuiltModel, Callable[[], None]]:
    built = build_model(spec, "cpu")
    built.module.train()
    if checkpointing:
        enable_checkpointing(built.module)
    inputs = built.make_inputs(BATCH, LENGTH)

    def step() -> None:
        built.module(**inputs).loss.backward()

    step()  # what is allocated once and stays
    built.module.zero_grad()
    return built, step


# Kernels that GPT-2 runs in bfloat16 allocate memory of their own on the CPU, which no plan sees.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen", "bfloat16"), ("gpt2", "float32")],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_peak_is_what_the_allocator_hands_out(
    folder, family, attention, checkpointing, dtype
):
    spec = ModelSpec(str(folder(family)), None, LENGTH, dtype, attention)
    meta = meta_model(spec)
    planned = run_passes(meta.module, meta.make_inputs, BATCH, LENGTH, checkpointing=checkpointing)
    _, step = real(spec, checkpointing)
    peak, _ = allocated(step)
    # Recomputing keeps the state of the random generator for every block.
    random = 3 * torch.get_rng_state().nbytes if checkpointing else 0
    least, slack = planned.kept.total, 1e-4 * planned.kept.total
    assert least - slack <= peak <= least + random + slack


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_planned_saved_bytes_are_what_autograd_packs(folder, family, attention):
    spec = ModelSpec(str(folder(family)), None, LENGTH, "float32", attention)
    meta = meta_model(spec)
    planned = run_passes(meta.module, meta.make_inputs, BATCH, LENGTH).saved
    built, _ = real(spec, False)
    inputs = built.make_inputs(BATCH, LENGTH)
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*built.module.parameters(), *built.module.buffers(), *inputs.values())
    }
    packed: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            packed[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = built.module(**inputs).loss
    counted = sum(storage.nbytes() for storage in packed.values())
    assert loss.requires_grad
    assert planned == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_extrapolated_blocks_equal_all_blocks(folder, family, checkpointing, batch_size):
    spec = ModelSpec(str(folder(family, 9)), None, LENGTH)
    meta = meta_model(spec)
    few, every = (
        run_passes(
            meta.module,
            meta.make_inputs,
            batch_size,
            LENGTH,
            checkpointing=checkpointing,
            extrapolate=extrapolate,
        )
        for extrapolate in (True, False)
    )
    assert few.blocks == 5 and every.blocks is None
    assert (few.saved, few.kept, few.freed) == (every.saved, every.kept, every.freed)
    assert few.arrivals == every.arrivals


def test_freed_gradients_never_exist_together(folder):
    meta = meta_model(ModelSpec(str(folder("llama")), None, LENGTH, "float32"))
    planned = run_passes(meta.module, meta.make_inputs, 1, 8)
    gradients = sum(4 * p.numel() for p in meta.module.parameters())
    assert planned.freed.total < planned.kept.total
    assert planned.kept.total <= planned.freed.total + gradients


def test_recomputing_saves_and_longer_sequences_cost(folder):
    meta = meta_model(ModelSpec(str(folder("llama", 9)), None, 256))
    saved = {
        (length, again): run_passes(
            meta.module, meta.make_inputs, 4, length, checkpointing=again
        ).saved
        for length in (64, 256)
        for again in (False, True)
    }
    assert saved[256, True] < saved[256, False] / 3
    assert saved[256, False] == pytest.approx(4 * saved[64, False], rel=0.01)


def test_a_model_of_experts_can_be_planned(tmp_path: Path):
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=4,
    )
    config.save_pretrained(tmp_path)
    meta = meta_model(ModelSpec(str(tmp_path), None, 16))
    assert run_passes(meta.module, meta.make_inputs, 2, 16).saved > 0


def test_images_can_be_planned(tmp_path: Path):
    from transformers import ResNetConfig

    ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=8).save_pretrained(tmp_path)
    meta = meta_model(ModelSpec(str(tmp_path)))
    small, large = (run_passes(meta.module, meta.make_inputs, size, 0).saved for size in (1, 4))
    assert small < large
