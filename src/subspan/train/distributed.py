"""One run on several processes, started by torchrun or `accelerate launch`.

Rank 0 does what one process does: it reads the text first, holds the run folder, writes metrics,
checkpoints' manifests and the result, and shows progress. The others wait for its word and then
take part in training. The batch is that of one process, dealt out in equal shares, so the number of
processes is no part of what a run is: it may differ from one session to the next.

A process that fails leaves the others in a collective that cannot end. torchrun's agent ends them;
without an agent gloo notices the lost connection, and NCCL waits for `TIMEOUT`.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

from subspan.train.errors import ElsewhereError, JobError, one_line

if TYPE_CHECKING:
    from torch import nn

    from subspan.train.config import TrainConfig
    from subspan.train.trainer import SubspanTrainer

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""A process that waits so long for another one gives up. Rank 0 reads new text in that time."""

_TRAIN = "train"
# Rank 0 has told the others what to do.
_told = False


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process; 0 leads."""
    return int(os.environ.get("RANK", "0"))


def check(config: TrainConfig) -> None:
    """Refuse what works in one process only.

    Raises:
        JobError: naming the field and what to do.
    """
    ranks = world_size()
    if ranks == 1:
        return
    if config.batch_size % ranks:
        raise JobError(
            f"batch_size={config.batch_size} cannot be divided among {ranks} processes: it is the "
            "batch of all of them together"
        )
    for name in ("int8_weights", "update_in_backward", "compile", "record_subspaces"):
        if getattr(config, name):
            raise JobError(f"{name} works in one process, not in {ranks}; leave it off")
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise JobError("the accelerate configuration asks for FSDP 1; set fsdp_version: 2")
    for name in ("fsdp_offload_params", "fsdp_activation_checkpointing"):
        if _accelerate(name):
            raise JobError(f"{name} of the accelerate configuration is not supported; set it false")


def _accelerate(name: str, default: str = "false") -> bool:
    """A setting of FSDP that `accelerate launch` has put into the environment."""
    return os.environ.get(name.upper(), default).lower() in ("true", "1", "yes")


def over_processes(config: TrainConfig, lead: Callable[[], T], follow: Callable[[], None]) -> T:
    """Run `lead` on rank 0 and, once it has called `call_others`, `follow` on the others.

    Returns:
        What `lead` returned, on every process.

    Raises:
        JobError: `lead` raised it, or another process was lost.
        ElsewhereError: on the other processes, if `lead` failed before it called them.
    """
    global _told
    _told = False
    try:
        _join(config)
        if rank() == 0:
            try:
                result = lead()
            except Exception as error:
                if not _told:
                    _tell(one_line(error))
                raise
            if not _told:
                _tell(None)
            return agreed(result)
        word = agreed(None)
        if word == _TRAIN:
            follow()
        elif word is not None:
            raise ElsewhereError(word)
        return agreed(None)  # type: ignore[return-value]
    except Exception as error:
        if not _is_lost(error):
            raise
        raise JobError(
            f"lost another process of the run ({shorten(one_line(error), 90)}); the same command "
            "goes on from the last complete checkpoint"
        ) from error


def _join(config: TrainConfig) -> None:
    """Make this process one of the group, as transformers.Trainer would do later."""
    from accelerate import PartialState

    # Accelerate would shard the model again, after the optimizer is made, and find the optimizer's
    # parameters by address, which pieces of size zero share. The precision is the configuration's.
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    PartialState(cpu=config.device == "cpu", timeout=TIMEOUT, **_fresh_store())


def _fresh_store() -> dict[str, Any]:
    """After torchrun's restart, a store without the addresses that processes left which died.

    torchrun keeps the store of the first attempt (pytorch/pytorch#135712). On several machines the
    number of the attempt may differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must be set instead.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("LOCAL_WORLD_SIZE") != str(world_size()):
        return {}
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, ranks = next(rendezvous("env://", timeout=TIMEOUT))
    prefixed = PrefixStore(f"attempt-{attempt}", store)
    return {"store": prefixed, "rank": number, "world_size": ranks}


def leave() -> None:
    """End the process group after success, if there is one; all processes call it.

    Threads of gloo that outlive the interpreter abort the process, so the groups must be gone, also
    those that the model's mesh holds in cycles of references.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def _tell(word: str | None) -> None:
    global _told
    _told = True
    agreed(word)


def call_others() -> None:
    """Let the other processes begin: text and model are ready, and the run folder is held."""
    if world_size() > 1:
        _tell(_TRAIN)


def agreed(value: T) -> T:
    """Rank 0's value."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T]:
    """The values of all processes."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _is_lost(error: BaseException) -> bool:
    """Whether `error`, or one that caused it, says that another process does not answer."""
    import torch.distributed as dist

    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, dist.DistError | RuntimeError) and re.search(
            r"gloo|nccl|closed by peer|reset by peer|TCPStore", text, re.IGNORECASE
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def training_batch(config: TrainConfig) -> int:
    """Sequences of one forward pass on one process."""
    return config.batch_size // world_size()


def evaluation_batch(config: TrainConfig, sequences: int) -> int:
    """Sequences of one evaluation pass on one process.

    Accelerate fills up an incomplete batch with sequences that have been seen, which would enter
    its mean; whole batches that are seen twice it drops. So the batch divides the sequences.
    """
    if world_size() == 1:
        return config.batch_size
    return max(b for b in range(1, training_batch(config) + 1) if sequences % b == 0)


def shard(model: nn.Module) -> None:
    """Cut every parameter over all processes with FSDP2, one unit per block.

    Accelerate can do that as well, but after the optimizer is made; Subspan's decide for whole
    parameters what to keep of each, so the parameters must be final.

    Args:
        model: on every process the same weights; of transformers, or the whole is one unit.
    """
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(PartialState().device.type, (world_size(),))
    reshard = _accelerate("fsdp_reshard_after_forward", default="true")
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def save_final(trainer: SubspanTrainer, folder: Path) -> None:
    """Write the finished model into the run folder; it appears when it is complete."""
    from subspan.train import runfolder

    final = folder / runfolder.FINAL
    partial = final.with_name(f".{final.name}.partial")
    if rank() == 0:
        for path in (final, partial):
            shutil.rmtree(path, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if rank() == 0:
        partial.rename(final)
