"""Weights of a model that is sharded over processes, from and to safetensors files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

FILE_BYTES = 5 * 10**9
"""Largest size of one file of a model; a larger tensor has a file of its own."""

_SINGLE = "model.safetensors"


def write_model(model: nn.Module, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write whole weights in the Hugging Face layout; all processes call it.

    Every process writes its pieces, from which rank 0 puts the files together, one tensor in memory
    at a time (torch.distributed.checkpoint's `HuggingFaceStorageWriter`). The pieces are deleted
    afterwards; the disk holds the model twice until then.

    Args:
        model: sharded by FSDP2. Weights that are tied are written once, as transformers does.
        folder: exists, on storage that all processes share.
        file_bytes: largest size of one file.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    repeated = every - {name for name, _ in model.named_parameters()}
    weights: dict[str, Any] = {
        k: v for k, v in get_model_state_dict(model).items() if k not in repeated
    }
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_files(weights, file_bytes),
        save_distributed=True,
        enable_consolidation=True,
    )
    save(weights, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded")
        files = list(folder.glob("model-*.safetensors"))
        if len(files) == 1:
            files[0].rename(folder / _SINGLE)
            (folder / f"{_SINGLE}.index.json").unlink()
    dist.barrier()


def _files(weights: dict[str, Tensor], file_bytes: int) -> dict[str, int]:
    """Number of the file of every tensor, from 1, filled in order."""
    number, used, files = 1, 0, {}
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        if used and used + size > file_bytes:
            number, used = number + 1, 0
        files[name], used = number, used + size
    return files


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give every process its pieces of whole weights that rank 0 reads; all processes call it."""
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    if dist.get_rank() == 0:
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
    # Not strict: of tied weights the file has one.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
