"""`subspan train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subspan.cli.common import ConfigFile, Quiet, Setting, console
from subspan.train import flags

_NOT_FIELDS = ("config", "resume", "until", "setting", "quiet")


def train(
    context: typer.Context,
    config: ConfigFile = None,
    output: Annotated[Path | None, typer.Option("--output", help="Run folder.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run in this folder.")
    ] = None,
    until: Annotated[
        int | None,
        typer.Option("--until", min=1, help="Stop after this step; later the run goes on."),
    ] = None,
    setting: Setting = None,
    quiet: Quiet = False,
    model: flags.Model = None,
    corpus: flags.Corpus = None,
    tokenizer: flags.Tokenizer = None,
    vocab_size: flags.Vocabulary = None,
    sequence_length: flags.Length = None,
    method: flags.Method = None,
    lr: flags.Lr = None,
    plain_lr: flags.PlainLr = None,
    rank: flags.Rank = None,
    update_proj_gap: flags.Gap = None,
    scale: flags.Scale = None,
    weight_decay: flags.Decay = None,
    steps: flags.Steps = None,
    tokens: flags.Tokens = None,
    batch_size: flags.Batch = None,
    accumulation: flags.Accumulation = None,
    warmup: flags.Warmup = None,
    clip: flags.Clip = None,
    update_in_backward: flags.UpdateInBackward = None,
    clipping: flags.Clipping = None,
    activation_checkpointing: flags.ActivationCheckpointing = None,
    int8_weights: flags.Int8Weights = None,
    eval_every: flags.EvalEvery = None,
    checkpoint_every: flags.CheckpointEvery = None,
    seed: flags.Seed = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    threads: flags.Threads = None,
    compile_model: flags.Compile = None,
    track: flags.Track = None,
    record_subspaces: flags.RecordSubspaces = None,
    parallel: flags.Parallel = None,
    projected_gradients: flags.ProjectedGradients = None,
) -> None:
    """Train one model with one method; the same command goes on with an interrupted run."""
    from subspan.report import build_report
    from subspan.train import distributed
    from subspan.train.files import write_text
    from subspan.train.job import run_job
    from subspan.train.overrides import fields, train_config
    from subspan.train.yamlfile import dump_yaml

    given = {k: v for k, v in context.params.items() if k not in _NOT_FIELDS}
    given["compile"] = given.pop("compile_model")
    resolved = train_config(config, fields(given, setting or ()), resume)
    out = console(quiet or distributed.rank() > 0)
    out.print(dump_yaml(resolved.model_dump(mode="json")), highlight=False, markup=False)
    result = run_job(resolved, out, until)
    if result is not None and distributed.rank() == 0:
        write_text(Path(resolved.output) / "report.html", build_report([resolved.output]))
    distributed.leave()
    if result is None:
        out.print(
            f"stopped at step {until} of {resolved.total_steps}; the same command without --until "
            "goes on",
            highlight=False,
            soft_wrap=True,
        )
        return
    out.print(
        f"validation loss {result['validation_loss']:.4f}, perplexity {result['perplexity']:.2f}; "
        f"everything is in {resolved.output}",
        highlight=False,
        soft_wrap=True,
    )
