"""The Trainer of one session of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, TrainingArguments, default_data_collator

from subspan.train import distributed, runfolder
from subspan.train.config import TrainConfig
from subspan.train.errors import JobError, one_line
from subspan.train.trainer import SubspanTrainer, build_optimizer

if TYPE_CHECKING:
    from subspan.train.job import Inputs


class StepProgress(TrainerCallback):
    """Reports every finished step to `report`."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state.global_step)


class StopAt(TrainerCallback):
    """Ends the session after step `last`, with a checkpoint there."""

    def __init__(self, last: int) -> None:
        self._last = last

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self._last:
            control.should_save = control.should_training_stop = True


def training_arguments(config: TrainConfig, folder: Path, held_out: int) -> TrainingArguments:
    """The configuration in transformers' words; checkpoints go to `folder`/checkpoints.

    Args:
        config: of the run.
        folder: of the run.
        held_out: sequences of an evaluation.
    """
    args = TrainingArguments(
        output_dir=str(folder / runfolder.CHECKPOINTS),
        max_steps=config.total_steps,
        per_device_train_batch_size=distributed.training_batch(config),
        per_device_eval_batch_size=distributed.evaluation_batch(config, held_out),
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        # The variant whose first step already has a learning rate above zero.
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_ratio},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        max_grad_norm=config.clip,
        logging_strategy="steps",
        logging_steps=config.log_every,
        # A loss that is not finite must be seen, not replaced by the average of earlier ones.
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.checkpoint_steps,
        save_total_limit=config.keep_checkpoints,
        # The data set is already in its order, which depends on nothing but the seed.
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        seed=config.seed,
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bfloat16-mixed",
        torch_compile=config.compile,
        **({"gradient_checkpointing": True} if config.activation_checkpointing else {}),
        disable_tqdm=True,
        report_to=[],
    )
    if args.n_gpu > 1:
        # Batch size and state bytes are those of one device; DataParallel would change both.
        args._n_gpu = 1
    return args


def make_trainer(config: TrainConfig, folder: Path, inputs: Inputs) -> SubspanTrainer:
    """Trainer with model, data and optimizer settings of the run.

    Raises:
        JobError: the method does not take an option or a value.
    """
    args = training_arguments(config, folder, len(inputs.validation))
    if distributed.world_size() > 1 and config.parallel == "fsdp":
        distributed.shard(inputs.model)
    hyper = config.hyper()
    grouping: dict[str, Any] = {
        "plain_lr": config.plain_lr,
        "project": config.project,
        "exclude": config.exclude,
    }
    from subspan.optim.backward import check_attachable

    try:
        trial: Any = build_optimizer(inputs.model, config.method, args, **grouping, **hyper)
        if config.update_in_backward:
            limit = args.max_grad_norm or None
            check_attachable(trial, config.accumulation, limit, config.clipping)
    except (ValueError, TypeError) as error:
        raise JobError(f"method {config.method}: {one_line(error)}") from None
    trainer = SubspanTrainer(
        inputs.model,
        args,
        data_collator=default_data_collator,
        train_dataset=inputs.train,
        eval_dataset=inputs.validation,
        processing_class=inputs.data.tokenizer,
        method=config.method,
        hyper=hyper,
        update_in_backward=config.update_in_backward,
        clipping=config.clipping,
        projected_gradients=config.projected_gradients and distributed.world_size() > 1,
        **grouping,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _own(trainer: SubspanTrainer) -> Any:
    """The optimizer itself, which Accelerate wraps."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def state_bytes(trainer: SubspanTrainer) -> dict[str, int]:
    """Bytes of the optimizer's state by kind, and in all under `total`."""
    counted: dict[str, int] = _own(trainer).state_bytes()
    return counted


def planned_bytes(trainer: SubspanTrainer) -> dict[str, int]:
    """Bytes of weights, gradients and states, activations aside, as declared before the run.

    Gradients are the largest one alone when every update happens in the backward pass.
    """
    planned: dict[str, int] = _own(trainer).memory()
    largest, whole = planned.pop("largest_gradient"), planned.pop("all_gradients")
    planned["gradients"] = largest if trainer.update_in_backward else whole
    planned.pop("total")
    return planned | {"total": sum(planned.values())}
