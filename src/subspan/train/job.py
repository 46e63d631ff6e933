"""One training run from its configuration to result.json.

Run folder: config.yaml, inputs.json (hashes of text and initial weights), metrics.jsonl,
subspaces.jsonl (when recorded), tensorboard/, checkpoints/, final/ (model and tokenizer in the
Hugging Face layout), result.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from subspan.train import distributed, runfolder
from subspan.train.config import TrainConfig
from subspan.train.errors import JobError, is_disk_full, one_line
from subspan.train.files import new_folder, write_json
from subspan.train.model import build_model, check_model_name, has_weights, weights_hash
from subspan.train.tracking import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subspan.train.data import PreparedData
    from subspan.train.packing import PackedSequences


@dataclass(frozen=True)
class Inputs:
    """What a run starts from; `record` is written to inputs.json."""

    data: PreparedData
    train: PackedSequences
    validation: PackedSequences
    model: PreTrainedModel
    record: dict[str, Any]


def run_job(
    config: TrainConfig, console: Console | None = None, until: int | None = None
) -> dict[str, Any] | None:
    """Train, or go on with an interrupted run, or return the result of a finished one.

    Args:
        config: the run; `config.output` is its folder.
        console: where progress is shown.
        until: stop after this step with a checkpoint there, unless the run is shorter. A later
            call goes on as if the run had not been stopped; its metrics have one more line, the
            training loss up to that step, unless a checkpoint was due there anyway.

    Returns:
        The content of result.json, or none when the run was stopped at `until`.

    Raises:
        JobError: bad input, an output folder that holds another run, a full disk, divergence.

    Under torchrun or `accelerate launch` every process calls it and gets the result.
    """
    if distributed.world_size() == 1:
        return _run_job(config, console, until)
    from subspan.train.followers import follow

    return distributed.over_processes(
        config, lambda: _run_job(config, console, until), lambda: follow(config, until)
    )


def _run_job(
    config: TrainConfig, console: Console | None, until: int | None
) -> dict[str, Any] | None:
    console = console or Console(stderr=True)
    folder = Path(config.output)
    config = _check(config)
    if until is not None and until >= config.total_steps:
        until = None
    if runfolder.check_output(folder, config):
        result = runfolder.read_result(folder)
        if result is not None:
            console.print(f"{folder} is finished; nothing to do", highlight=False)
            return result
        if _reached(folder, until):
            console.print(f"{folder}: step {until} is done; nothing to do", highlight=False)
            return None
    _quiet_libraries()
    existed = folder.exists()
    try:
        inputs = prepare(config, console)
        with runfolder.locked(folder):
            # Asked again: another process may have worked on the folder before the lock was ours.
            runfolder.check_output(folder, config)
            return _train(config, folder, inputs, console, until)
    except OSError as error:
        raise _disk_error(error, folder) from error
    except Exception as error:
        # safetensors and others report a full disk with types of their own.
        if not is_disk_full(error):
            raise
        raise _disk_error(error, folder) from error
    finally:
        if not existed and folder.is_dir() and not (folder / runfolder.METRICS).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _reached(folder: Path, until: int | None) -> bool:
    from subspan.train.checkpoints import last_complete, step_of

    last = last_complete(folder / runfolder.CHECKPOINTS)
    return until is not None and last is not None and (step_of(last) or 0) >= until


def _disk_error(error: BaseException, folder: Path) -> JobError:
    if is_disk_full(error):
        return JobError(
            f"the disk of {folder} (or of the cache) is full; free space and run the same command "
            "again: earlier checkpoints are untouched and the run goes on from the last one"
        )
    return JobError(f"cannot use {getattr(error, 'filename', None) or folder}: {one_line(error)}")


def check_method(method: str, hyper: dict[str, Any]) -> str:
    """Registered name of `method`, which may be given in its published spelling.

    Raises:
        JobError: unknown method, or one that does not have an option of `hyper`.
    """
    from subspan.optim import lookup

    try:
        recipe = lookup(method)
        recipe.check_options(hyper)
    except (ValueError, TypeError) as error:
        raise JobError(one_line(error)) from None
    return recipe.name


def _check(config: TrainConfig) -> TrainConfig:
    """Refuse what can be refused before text is read and libraries are loaded."""
    check_model_name(config.model)
    check_trackers(config.track)
    distributed.check(config)
    return config.model_copy(update={"method": check_method(config.method, config.hyper())})


def _quiet_libraries() -> None:
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # One process may go on with what several have written.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def prepare(config: TrainConfig, console: Console) -> Inputs:
    """Text, model and their hashes; nothing is written but the cache."""
    import torch

    from subspan.train.data import prepare_data
    from subspan.train.packing import pack

    if config.threads:
        torch.set_num_threads(config.threads)
    with console.status("reading text"):
        own = config.model if has_weights(config.model) else None
        data = prepare_data(config.data, default_tokenizer=own)
    train, validation = pack(data, config)
    model = build_model(
        config.model,
        data.tokenizer,
        seed=config.seed,
        sequence_length=config.data.sequence_length,
        dtype="bfloat16" if config.dtype == "bfloat16" else "float32",
    )
    if config.int8_weights:
        from subspan.layers import quantise_linear

        quantise_linear(model)
    record = {
        "corpus_hash": data.corpus_hash,
        "documents": {"training": data.documents[0], "validation": data.documents[1]},
        "characters": data.characters,
        "tokens": {"training": len(data.train), "validation": len(data.validation)},
        "validation_sequences": len(validation),
        "vocabulary": len(data.tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "initial_weights_hash": weights_hash(model),
        "data_order_hash": hashlib.sha256(train.order.tobytes()).hexdigest(),
        "seed": config.seed,
    }
    return Inputs(data, train, validation, model, record)


def _train(
    config: TrainConfig, folder: Path, inputs: Inputs, console: Console, until: int | None
) -> dict[str, Any] | None:
    from subspan.train.callbacks import Metrics
    from subspan.train.checkpoints import check_resumable, last_complete, remove_incomplete, step_of
    from subspan.train.machine import describe, peak_memory, reset_peak_memory
    from subspan.train.metrics import keep_metrics, read_metrics
    from subspan.train.progress import RunProgress
    from subspan.train.recorder import SUBSPACES, SubspaceRecorder
    from subspan.train.session import StepProgress, StopAt, make_trainer, planned_bytes, state_bytes
    from subspan.train.tracking import open_trackers

    distributed.call_others()  # From here on `followers.follow` does the same beside this.
    trainer = make_trainer(config, folder, inputs)
    last = distributed.agreed(last_complete(folder / runfolder.CHECKPOINTS))
    if last is not None:
        check_resumable(last, trainer.identity())
    _record_inputs(folder, config, inputs.record)
    remove_incomplete(folder / runfolder.CHECKPOINTS)
    done = (last and step_of(last)) or 0
    sent = [line for name in (runfolder.METRICS, SUBSPACES) for line in read_metrics(folder / name)]
    lines = keep_metrics(folder / runfolder.METRICS, done)
    if done:
        console.print(f"{folder}: going on from step {done}", highlight=False)
    with ExitStack() as stack:
        name = f"{config.method} on {config.model}"
        progress = stack.enter_context(RunProgress(console, name, config.total_steps, done))
        trackers = open_trackers(config.track, folder, config.identity(), done, sent)
        for tracker in trackers:
            stack.callback(tracker.close)
        tracked = [tracker.add for tracker in trackers]
        listeners = [lines.append, progress.add, *tracked]
        metrics = Metrics(
            folder / runfolder.METRICS,
            config.tokens_per_step,
            list(lines),
            listeners,
        )
        stack.callback(metrics.close)
        if until is not None:
            trainer.add_callback(StopAt(until))  # before the metrics, which look at its wishes
        trainer.add_callback(metrics)
        if config.record_subspaces:
            recorder = SubspaceRecorder(folder / SUBSPACES, console.print, tracked)
            stack.callback(recorder.close)
            trainer.add_callback(recorder)
        trainer.add_callback(StepProgress(progress.step))
        reset_peak_memory()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        peak = peak_memory()
    if trainer.state.global_step < config.total_steps:
        return None
    planned = planned_bytes(trainer)
    _save_final(trainer, folder)
    # Of the process that needs the most.
    sizes, peaks = zip(*distributed.gathered((state_bytes(trainer), peak)), strict=True)
    largest = max(sizes, key=lambda size: size["total"])
    result = _result(config, inputs.record, lines, largest) | describe()
    result["planned_bytes"] = planned
    result["peak_memory_bytes"] = max(peaks, key=lambda each: each["process"])
    result["processes"] = distributed.world_size()
    write_json(folder / runfolder.RESULT, result)
    return result


def _record_inputs(folder: Path, config: TrainConfig, record: dict[str, Any]) -> None:
    """Write config.yaml and inputs.json, or check that a resumed run has the same inputs."""
    path = folder / runfolder.INPUTS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        # A run that an earlier version began may lack what is recorded now.
        known = {name: record.get(name) for name in before}
        difference = runfolder.first_difference(before, json.loads(json.dumps(known)))
        if difference:
            raise JobError(
                f"cannot go on with {folder}: {difference[0]} has changed since the run began; "
                "choose another output folder"
            )
    # The configuration first: it is what makes the folder this run's, should the process be killed.
    runfolder.write_config(folder, config)
    write_json(path, record)


def _save_final(trainer: Any, folder: Path) -> None:
    from subspan.layers import dequantise_linear

    final = folder / runfolder.FINAL
    if distributed.world_size() > 1:
        distributed.save_final(trainer, folder)
        return
    dequantise_linear(trainer.model)
    shutil.rmtree(final, ignore_errors=True)
    with new_folder(final) as temporary:
        trainer.save_model(str(temporary))


def _result(
    config: TrainConfig,
    record: dict[str, Any],
    lines: list[dict[str, Any]],
    state_bytes: dict[str, int],
) -> dict[str, Any]:
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "validation_loss" in line]
    last = evaluation[-1]
    return {
        "method": config.method,
        "steps": last["step"],
        "tokens": last["tokens"],
        "validation_loss": last["validation_loss"],
        "perplexity": last["perplexity"],
        "training_loss": training[-1]["loss"],
        "seconds": last["seconds"],
        "optimizer_seconds": last["optimizer_seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "state_bytes": state_bytes,
        "inputs": record,
    }
