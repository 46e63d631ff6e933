"""The flags of `subspan train`, each a field of the configuration of the same name."""

from __future__ import annotations

from typing import Annotated

import typer

_METHOD, _TEXT, _RUN = "Method", "Model and text", "Run"

Model = Annotated[
    str | None, typer.Option("--model", help="Named size or local folder.", rich_help_panel=_TEXT)
]
Corpus = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus", help="Built-in name, file, folder or datasets:NAME.", rich_help_panel=_TEXT
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder of a tokenizer.", rich_help_panel=_TEXT)
]
Vocabulary = Annotated[
    int | None,
    typer.Option("--vocab-size", help="Size of a tokenizer trained here.", rich_help_panel=_TEXT),
]
Length = Annotated[
    int | None,
    typer.Option("--sequence-length", help="Tokens of one sequence.", rich_help_panel=_TEXT),
]
Method = Annotated[
    str | None,
    typer.Option("--method", help="Name from `subspan methods`.", rich_help_panel=_METHOD),
]
Lr = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate of projected matrices.", rich_help_panel=_METHOD),
]
PlainLr = Annotated[
    float | None,
    typer.Option("--plain-lr", help="Learning rate of everything else.", rich_help_panel=_METHOD),
]
Rank = Annotated[
    str | None,
    typer.Option("--rank", help="Rank, or share of the smaller side.", rich_help_panel=_METHOD),
]
Gap = Annotated[
    int | None,
    typer.Option("--update-proj-gap", help="Steps between refreshes.", rich_help_panel=_METHOD),
]
Scale = Annotated[
    float | None,
    typer.Option("--scale", help="Factor of the lifted update.", rich_help_panel=_METHOD),
]
Decay = Annotated[
    float | None,
    typer.Option("--weight-decay", help="Decoupled weight decay.", rich_help_panel=_METHOD),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Optimizer steps.", rich_help_panel=_RUN)
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", help="Training tokens, instead of steps.", rich_help_panel=_RUN),
]
Batch = Annotated[
    int | None,
    typer.Option("--batch-size", help="Sequences of one forward pass.", rich_help_panel=_RUN),
]
Accumulation = Annotated[
    int | None,
    typer.Option("--accumulation", help="Forward passes of one step.", rich_help_panel=_RUN),
]
Warmup = Annotated[
    str | None,
    typer.Option("--warmup", help="Warm-up steps, or share of all.", rich_help_panel=_RUN),
]
Clip = Annotated[
    float | None,
    typer.Option("--clip", help="Largest gradient norm; 0: none.", rich_help_panel=_RUN),
]
UpdateInBackward = Annotated[
    bool | None,
    typer.Option(
        "--update-in-backward/--no-update-in-backward",
        help="Free each gradient as soon as it is used.",
        rich_help_panel=_RUN,
    ),
]
Clipping = Annotated[
    str | None,
    typer.Option(
        "--clipping", help="With that, the norm to clip: whole, inside, each.", rich_help_panel=_RUN
    ),
]
ActivationCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--activation-checkpointing/--no-activation-checkpointing",
        help="Compute activations again in the backward pass.",
        rich_help_panel=_RUN,
    ),
]
Int8Weights = Annotated[
    bool | None,
    typer.Option(
        "--int8-weights/--no-int8-weights",
        help="Hold the blocks' weights in int8.",
        rich_help_panel=_RUN,
    ),
]
EvalEvery = Annotated[
    int | None,
    typer.Option("--eval-every", help="Steps between evaluations.", rich_help_panel=_RUN),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option("--checkpoint-every", help="Steps between checkpoints.", rich_help_panel=_RUN),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of weights and data order.", rich_help_panel=_RUN)
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or bfloat16-mixed.", rich_help_panel=_RUN),
]
Device = Annotated[str | None, typer.Option("--device", help="auto or cpu.", rich_help_panel=_RUN)]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads on the CPU.", rich_help_panel=_RUN)
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the model.", rich_help_panel=_RUN),
]
Track = Annotated[
    str | None,
    typer.Option(
        "--track", help="tensorboard, wandb, trackio, separated by commas.", rich_help_panel=_RUN
    ),
]
RecordSubspaces = Annotated[
    bool | None,
    typer.Option(
        "--record-subspaces/--no-record-subspaces",
        help="Record what the subspaces do, for the report.",
        rich_help_panel=_RUN,
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option("--parallel", help="With several processes: fsdp, ddp.", rich_help_panel=_RUN),
]
ProjectedGradients = Annotated[
    bool | None,
    typer.Option(
        "--projected-gradients/--no-projected-gradients",
        help="With ddp, send coordinates instead of gradients.",
        rich_help_panel=_RUN,
    ),
]
