"""Checkpoints of sharded models with torch.distributed.checkpoint (DCP).

Every process writes its share; the checkpoint loads on any number of processes, also on one and
without torchrun. `torch.distributed.checkpoint.state_dict.get_state_dict` works with Subspan's
optimizers as well; it takes the shapes of the state from a step with zero gradients, which are not
those of the checkpoint for methods whose state changes with the period (GUM). Here they are read
from the checkpoint itself.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from subspan.optim.placing import is_sharded

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer

_MODEL, _STATE, _PLAIN = "model/", "optimizer/", "plain"
_PARTIAL = ".partial"  # how the name of a folder ends that is being written


def save_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizer: SubspaceOptimizer,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write weights and optimizer state; all processes call it, and each writes its share.

    The folder appears under its name only when it is complete.

    Args:
        folder: must not exist; on storage that all processes share.
        model: sharded by FSDP2, replicated, or on one process.
        optimizer: of its parameters.
        extra: numbers and text to keep with them (the step, a scheduler's state).

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"checkpoint {folder} exists; choose another folder")
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _barrier()
    state = optimizer.state_dict()
    names = _names(optimizer)
    flat = {_MODEL + name: value for name, value in get_model_state_dict(model).items()}
    numbers: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        name = names[number]
        numbers[name] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        flat |= {f"{_STATE}{name}/{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    flat[_PLAIN] = _packed(
        {"groups": state["param_groups"], "numbers": numbers, "extra": extra or {}}
    )
    save(flat, checkpoint_id=partial, no_dist=not dist.is_initialized())
    _barrier()
    if _rank() == 0:
        partial.rename(folder)
    _barrier()


def load_sharded(
    folder: str | Path, model: nn.Module, optimizer: SubspaceOptimizer
) -> dict[str, Any]:
    """Load what `save_sharded` wrote on any number of processes; all of this one's call it.

    Args:
        folder: of the checkpoint.
        model: the same model, sharded or not.
        optimizer: of its parameters, of the same method and options.

    Returns:
        What was given as `extra`.

    Raises:
        ValueError: the checkpoint is of another method, model or rank.
        FileNotFoundError: there is no complete checkpoint.
    """
    folder = Path(folder)
    if folder.name.endswith(_PARTIAL) or not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} holds no complete checkpoint")
    names = _names(optimizer)
    numbers = {name: number for number, name in names.items()}
    members = [p for group in optimizer.param_groups for p in group["params"]]
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {_MODEL + name: value for name, value in get_model_state_dict(model).items()}
    _check_model(folder, weights, found)
    flat: dict[str, Any] = {}
    places: list[tuple[str, str, str]] = []
    for key, about in found.items():
        assert isinstance(about, TensorStorageMetadata)
        if key == _PLAIN:
            flat[key] = torch.zeros(about.size, dtype=torch.uint8)
        elif key.startswith(_STATE):
            name, _, slot = key.removeprefix(_STATE).rpartition("/")
            _check_known(folder, name, numbers)
            places.append((key, name, slot))
            flat[key] = _room(about.size, about.properties.dtype, members[numbers[name]])
    alone = not dist.is_initialized()
    load(flat, checkpoint_id=folder, no_dist=alone)
    plain = _unpacked(flat[_PLAIN])
    for name in plain["numbers"]:
        _check_known(folder, name, numbers)
    state = {numbers[name]: dict(entries) for name, entries in plain["numbers"].items()}
    for key, name, slot in places:
        state[numbers[name]][slot] = flat[key]
    # The optimizer first: it refuses what does not fit, and weights are loaded in place.
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
    load(weights, checkpoint_id=folder, no_dist=alone)
    own = {name.removeprefix(_MODEL): value for name, value in weights.items()}
    set_model_state_dict(model, own, options=StateDictOptions(strict=True))
    extra: dict[str, Any] = plain["extra"]
    return extra


def _check_model(folder: Path, weights: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model."""
    saved = {k: tuple(v.size) for k, v in found.items() if k.startswith(_MODEL)}
    own = {k: tuple(v.shape) for k, v in weights.items()}
    for key in sorted(saved.keys() | own.keys()):
        if saved.get(key) != own.get(key):
            raise ValueError(
                f"{key.removeprefix(_MODEL)!r} has shape {saved.get(key, 'none')} in checkpoint "
                f"{folder}, {own.get(key, 'none')} in the model"
            )


def _check_known(folder: Path, name: str, numbers: dict[str, int]) -> None:
    if name not in numbers:
        raise ValueError(
            f"checkpoint {folder} holds state of parameter {name!r}, which this optimizer does "
            "not have"
        )


def _packed(value: dict[str, Any]) -> Tensor:
    """Numbers and text as bytes: DCP would flatten lists and change tuples."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8).clone()


def _unpacked(data: Tensor) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    return loaded


def _names(optimizer: SubspaceOptimizer) -> dict[int, str]:
    """Names of the parameters by their numbers in a state dict."""
    members = (p for group in optimizer.param_groups for p in group["params"])
    return {number: optimizer.layout_of(p).name for number, p in enumerate(members)}


def _room(size: torch.Size, dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Where a state tensor is loaded to: this rank's rows of it if the parameter is sharded."""
    if not is_sharded(parameter) or not size:
        return torch.zeros(size, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard, zeros

    assert isinstance(parameter, DTensor)
    placements = [Replicate() if p == Replicate() else Shard(0) for p in parameter.placements]
    return zeros(tuple(size), dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
