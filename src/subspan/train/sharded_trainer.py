"""What `transformers.Trainer` lacks for a model whose parameters FSDP2 has already sharded.

The Trainer can let Accelerate shard the model, but only after the optimizer is made. Here the model
comes sharded (`torch.distributed.fsdp.fully_shard`), and is not wrapped again; checkpoints hold
weights and optimizer in pieces (torch.distributed.checkpoint), which load on any number of
processes. A checkpoint of one process loads here, and one of these in one process.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from subspan.optim.placing import is_sharded

if TYPE_CHECKING:
    from torch.optim import Optimizer

SHARDED = "sharded"
"""Folder in a checkpoint that holds the pieces of weights and optimizer state."""


class ShardedTrainer(Trainer):
    """`transformers.Trainer` for models that may be sharded; with any other model it is just that.

    Attributes:
        projected_gradients: with DistributedDataParallel, average coordinates where the optimizer
            needs no more; see `subspan.optim.ddp.project_gradients_in_ddp`.
    """

    projected_gradients = False
    optimizer: Optimizer | None
    _hook: Any = None

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded."""
        return any(is_sharded(parameter) for parameter in self.model.parameters())

    @property
    def _own_optimizer(self) -> Any:
        # Accelerate wraps the optimizer.
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _wrap_model(self, model: nn.Module, *positional: Any, **keywords: Any) -> nn.Module:
        if not self.sharded:
            wrapped: nn.Module = super()._wrap_model(model, *positional, **keywords)
            return wrapped
        if not getattr(model, "_is_accelerate_prepared", False):
            # Autocast only. Accelerate leaves alone what it has prepared; else it would use DDP.
            model = self.accelerator.prepare_model(
                model, device_placement=False, evaluation_mode=True
            )
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    def training_step(self, model: nn.Module, *positional: Any, **keywords: Any) -> Tensor:
        """As in `transformers.Trainer`."""
        if self.projected_gradients and self._hook is None:
            from subspan.optim.ddp import project_gradients_in_ddp

            self._hook = project_gradients_in_ddp(model, self._own_optimizer)  # type: ignore[arg-type]
        loss: Tensor = super().training_step(model, *positional, **keywords)
        return loss

    # ------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer in the Hugging Face layout.

        All processes call it if the model is sharded. A checkpoint holds its weights in pieces, so
        there only the configuration is written.
        """
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        from subspan.train.shards import write_model

        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_words(folder)
        self.accelerator.wait_for_everyone()
        if not _internal_call:
            write_model(self.model, folder)

    def _save_words(self, folder: Path) -> None:
        """Everything but weights."""
        config = self.model.config
        # As save_pretrained does, which cannot be used: it gathers the weights.
        config.architectures = [_class_name(self.model)]
        config.dtype = str(self.model.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from subspan.optim.sharded_checkpoint import save_sharded

        folder = Path(output_dir)
        if self.args.should_save:
            shutil.rmtree(folder / SHARDED, ignore_errors=True)  # of a session that was killed
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self.accelerator.wait_for_everyone()
        save_sharded(folder / SHARDED, self.model, self._own_optimizer)

    # ------------------------------------------------------------------ loading

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / SHARDED).is_dir():
            return  # The weights come with the optimizer's state, once there is an optimizer.
        if self.sharded:
            from subspan.train.shards import load_weights

            load_weights(self.model, folder)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / SHARDED).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from subspan.optim.sharded_checkpoint import load_sharded

        folder = Path(checkpoint)
        load_sharded(folder / SHARDED, self.model, self._own_optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _class_name(model: nn.Module) -> str:
    """Name of the model's class, which FSDP2 has replaced by a subclass."""
    return type(model).__name__.removeprefix("FSDP")
