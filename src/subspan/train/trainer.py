"""`transformers.Trainer` with any method of `subspan.optim`, and exact resume.

The training loop, gradient accumulation, clipping, schedules and data loading are transformers'.
Added here: the optimizer by name, with the weight-decay split and the Adam settings of
`TrainingArguments` (which transformers' own low-rank optimizers drop), and checkpoints that are
either complete or not used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from subspan.train import checkpoints
from subspan.train.errors import JobError
from subspan.train.files import check_space
from subspan.train.sharded_trainer import ShardedTrainer

if TYPE_CHECKING:
    from collections.abc import Collection

    from subspan.optim import SubspaceOptimizer
    from subspan.optim.backward import BackwardUpdates, Clipping

_ADAM_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8}


def rates(args: TrainingArguments) -> dict[str, float]:
    """Learning rate and weight decay of `args` under the optimizer's names."""
    return {"lr": args.learning_rate, "weight_decay": args.weight_decay}


def _is_pair(name: str, default: Any) -> bool:
    """Whether an option called eps is not Adam's, but Adafactor's two."""
    return name == "eps" and isinstance(default, tuple)


def adam_settings(method: str, args: TrainingArguments) -> dict[str, Any]:
    """`betas` and `eps` of `args`, as far as `method` has them.

    A method that trains with Adam only what it does not project calls them `adam_betas` and
    `adam_eps`; they keep its own defaults unless `args` changes theirs.

    Raises:
        ValueError: unknown method, or `args` changes a setting that the method does not have.
    """
    from subspan.optim import lookup

    recipe = lookup(method)
    found: dict[str, Any] = {}
    for name, value in (("betas", (args.adam_beta1, args.adam_beta2)), ("eps", args.adam_epsilon)):
        changed = value != _ADAM_DEFAULTS[name]
        if f"adam_{name}" in recipe.defaults:
            found |= {f"adam_{name}": value} if changed else {}
        elif name in recipe.defaults and not _is_pair(name, recipe.defaults[name]):
            found[name] = value
        elif changed:
            raise ValueError(f"{recipe.title} has no option {name}; leave it at its default")
    return found


def parameter_groups(
    model: nn.Module,
    *,
    decayed: Collection[str],
    weight_decay: float,
    lr: float,
    plain_lr: float | None = None,
    project: list[str] | None = None,
    exclude: list[str] | None = None,
    whole: bool = False,
) -> list[dict[str, Any]]:
    """Groups of `subspan.optim.param_groups_for_model`, each split by weight decay.

    Args:
        model: its trainable parameters are grouped.
        decayed: names of the parameters that decay; the others get `weight_decay` 0.
        weight_decay: of the decayed parameters.
        lr: learning rate of the projected matrices.
        plain_lr: learning rate of everything else; none: `lr`.
        project: regular expressions of names of the parameters to project.
        exclude: regular expressions of names of parameters never to project.
        whole: the method takes all parameters, not only matrices (BAdam).

    Returns:
        Groups of named parameters: what is projected first, each with and without decay.
    """
    from subspan.optim import param_groups_for_model

    groups = []
    for group in param_groups_for_model(model, project, exclude, whole=whole):
        rate = lr if group["project"] or plain_lr is None else plain_lr
        split: dict[float, list[Any]] = {}
        for name, parameter in group["params"]:
            decay = weight_decay if name in decayed else 0.0
            split.setdefault(decay, []).append((name, parameter))
        for decay, named in split.items():
            groups.append(group | {"params": named, "lr": rate, "weight_decay": decay})
    return groups


class _Factory:
    """What `Trainer` calls, as `_Factory()(model, **kwargs)`, when it needs the optimizer."""

    def __call__(self, model: nn.Module, *, build: Callable[[nn.Module], Optimizer]) -> Optimizer:
        return build(model)


def optimizer_cls_and_kwargs(
    model: nn.Module,
    method: str,
    args: TrainingArguments | None = None,
    *,
    plain_lr: float | None = None,
    project: list[str] | None = None,
    exclude: list[str] | None = None,
    **hyper: Any,
) -> tuple[type, dict[str, Any]]:
    """Argument `optimizer_cls_and_kwargs` of a plain `transformers.Trainer`.

    Args:
        model: the model that the Trainer will get; wrong options are found here, not in training.
        method: name in `subspan.optim.methods()`.
        args: learning rate, betas, eps and weight decay come from here unless given in `hyper`;
            none: from the recipe's defaults.
        plain_lr: learning rate of what is not projected; none: the same.
        project: regular expressions of names of the parameters to project.
        exclude: regular expressions of names of parameters never to project.
        **hyper: options of the method.

    Raises:
        ValueError, TypeError: unknown method or option, or a value that is not allowed.

    Example:
        >>> plug = optimizer_cls_and_kwargs(model, "galore", args, rank=128)
        >>> Trainer(model, args, optimizer_cls_and_kwargs=plug, ...)
    """

    def build(built_for: nn.Module) -> Optimizer:
        return build_optimizer(
            built_for, method, args, plain_lr=plain_lr, project=project, exclude=exclude, **hyper
        )

    build(model)
    return _Factory, {"build": build}


def build_optimizer(
    model: nn.Module,
    method: str,
    args: TrainingArguments | None = None,
    *,
    decayed: Collection[str] | None = None,
    plain_lr: float | None = None,
    project: list[str] | None = None,
    exclude: list[str] | None = None,
    **hyper: Any,
) -> Optimizer:
    """Optimizer of `model` with the settings of `args`; see `optimizer_cls_and_kwargs`.

    `decayed` names the parameters that decay; none: the Trainer's rule (no norms, no biases).
    """
    from subspan.optim import build, lookup

    recipe = lookup(method)
    recipe.check_options(hyper)
    # Without arguments the recipe's own defaults hold. (Making TrainingArguments here would reset
    # the state of a Trainer that is being set up.)
    source = recipe.defaults if args is None else rates(args)
    given = {} if args is None else adam_settings(method, args)
    lr = hyper.pop("lr", source["lr"])
    groups = parameter_groups(
        model,
        decayed=_decayed_names(model) if decayed is None else decayed,
        weight_decay=hyper.pop("weight_decay", source["weight_decay"]),
        lr=lr,
        plain_lr=plain_lr,
        project=project,
        exclude=exclude,
        whole=recipe.compose({**recipe.defaults, **given, **hyper}).takes_all,
    )
    optimizer: Optimizer = build(method, groups, lr=lr, **(given | hyper))
    return optimizer


def attach_to_backward(
    optimizer: SubspaceOptimizer, model: nn.Module, args: TrainingArguments, clipping: Clipping
) -> BackwardUpdates:
    """Let an optimizer update inside the backward pass, as the accumulation and clipping of `args`
    ask for."""
    return optimizer.attach_to_backward(
        model,
        accumulation_steps=args.gradient_accumulation_steps,
        max_norm=args.max_grad_norm or None,
        clipping=clipping,
    )


def _decayed_names(model: nn.Module) -> set[str]:
    # The method uses nothing of the Trainer, so its rule is at hand before there is a Trainer.
    return set(Trainer.get_decay_parameter_names(None, model))


class SubspanTrainer(ShardedTrainer):
    """`transformers.Trainer` whose optimizer is a method of `subspan.optim`.

    Args:
        *positional: as in `transformers.Trainer`.
        method: name in `subspan.optim.methods()`.
        hyper: options of the method; `lr`, `betas`, `eps` and `weight_decay` default to those of
            the `TrainingArguments`.
        plain_lr: learning rate of what is not projected (embeddings, head, norms, biases);
            none: the same as of what is projected.
        project: regular expressions of names to project; none: the blocks' matrices.
        exclude: regular expressions of names of parameters never to project.
        update_in_backward: free each gradient as soon as it is used; see
            `subspan.optim.SubspaceOptimizer.attach_to_backward`. `max_grad_norm` is then applied
            there, and no gradient norm is logged.
        clipping: whose norm `max_grad_norm` limits then.
        projected_gradients: with DistributedDataParallel, average coordinates of gradients where
            the method needs no more.
        **keywords: as in `transformers.Trainer`.

    Checkpoints are folders in the Hugging Face layout. One that a crash cut short is skipped by
    `train(resume_from_checkpoint=True)`; one of another method, option or model is refused.
    A model may come sharded by `torch.distributed.fsdp.fully_shard`.
    """

    def __init__(
        self,
        *positional: Any,
        method: str = "galore",
        hyper: Mapping[str, Any] | None = None,
        plain_lr: float | None = None,
        project: list[str] | None = None,
        exclude: list[str] | None = None,
        update_in_backward: bool = False,
        clipping: Clipping = "whole",
        projected_gradients: bool = False,
        **keywords: Any,
    ) -> None:
        self.method = method
        self.update_in_backward, self.clipping = update_in_backward, clipping
        self.projected_gradients = projected_gradients
        self.hyper = dict(hyper or {})
        self.grouping: dict[str, Any] = {
            "plain_lr": plain_lr,
            "project": project,
            "exclude": exclude,
        }
        super().__init__(*positional, **keywords)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer unless there is one."""
        if self.optimizer is None:
            built_for = self.model if model is None else model
            self.optimizer = build_optimizer(
                built_for,
                self.method,
                self.args,
                decayed=self.get_decay_parameter_names(built_for),
                **self.grouping,
                **self.hyper,
            )
            if self.update_in_backward:
                own: Any = self.optimizer
                attach_to_backward(own, built_for, self.args, self.clipping)
                self.args.max_grad_norm = 0.0  # there is nothing left to clip after the pass
        return self.optimizer

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed by this trainer."""
        settings = {
            "lr": self.args.learning_rate,
            "betas": [self.args.adam_beta1, self.args.adam_beta2],
            "eps": self.args.adam_epsilon,
            "weight_decay": self.args.weight_decay,
        }
        model = self.accelerator.unwrap_model(self.model)
        return checkpoints.identity(self.method, settings | self.grouping | self.hyper, model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        """As in `transformers.Trainer`; `True` resumes from the last complete checkpoint.

        Raises:
            JobError: no complete checkpoint, or it belongs to another method, option or model.
        """
        if resume_from_checkpoint is True:
            last = checkpoints.last_complete(Path(self.args.output_dir))
            if last is None:
                raise JobError(f"no complete checkpoint in {self.args.output_dir} to resume from")
            resume_from_checkpoint = str(last)
        if resume_from_checkpoint:
            checkpoints.check_resumable(Path(resume_from_checkpoint), self.identity())
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **keywords)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        parent = Path(self._get_output_dir(trial=trial))
        folder = parent / f"checkpoint-{self.state.global_step}"
        # Older checkpoints go only after the new one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.commit(folder, self.identity())
        except BaseException as error:
            if self.args.should_save:
                _discard(folder, error)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )


def _discard(folder: Path, error: BaseException) -> None:
    """Delete a part of a checkpoint: it is of no use and may be what fills the disk.

    Raises:
        OSError: the disk is full, which `error` may not say.
    """
    try:
        if isinstance(error, RuntimeError):
            check_space(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
