"""`subspan plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subspan.cli.common import ConfigFile, Quiet, console

_NOT_FLAGS = ("config", "budget", "json_file", "picture", "measure", "quiet")
_MODEL, _METHOD, _RUN, _OUT = "Model", "Method", "Training", "Output"


def _option(name: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, **more)


def plan(
    context: typer.Context,
    config: ConfigFile = None,
    model: Annotated[
        str | None,
        _option("--model", "Named size, folder, config.json or module:function.", _MODEL),
    ] = None,
    vocab_size: Annotated[int | None, _option("--vocab-size", "Tokens.", _MODEL)] = None,
    dtype: Annotated[
        str | None, _option("--dtype", "bfloat16, float32 or bfloat16-mixed.", _MODEL)
    ] = None,
    attention: Annotated[
        str | None, _option("--attention", "auto, eager, sdpa or flash.", _MODEL)
    ] = None,
    int8_weights: Annotated[
        bool | None,
        _option("--int8-weights/--no-int8-weights", "Train int8 weights in the blocks.", _MODEL),
    ] = None,
    adapter: Annotated[
        Path | None, _option("--adapter", "PEFT configuration: folder or JSON file.", _MODEL)
    ] = None,
    base_weights: Annotated[
        str | None, _option("--base-weights", "Frozen weights: none, int8 or int4.", _MODEL)
    ] = None,
    method: Annotated[
        list[str] | None,
        _option("--method", "Name, several names, or all (default with --budget).", _METHOD),
    ] = None,
    rank: Annotated[
        str | None, _option("--rank", "Rank, or share of the smaller side.", _METHOD)
    ] = None,
    storage: Annotated[
        str | None,
        _option("--storage", "Format of states: int8, bf16, or basis=int4,...", _METHOD),
    ] = None,
    option: Annotated[
        list[str] | None,
        _option("--option", "Any other option of the method.", _METHOD, metavar="KEY=VALUE"),
    ] = None,
    sequence_length: Annotated[
        int | None, _option("--sequence-length", "Tokens of one sequence.", _RUN)
    ] = None,
    batch_size: Annotated[
        int | None, _option("--batch-size", "Sequences of one forward pass.", _RUN)
    ] = None,
    accumulation: Annotated[
        int | None, _option("--accumulation", "Forward passes of one step.", _RUN)
    ] = None,
    checkpointing: Annotated[
        str | None, _option("--checkpointing", "Recompute activations: none or full.", _RUN)
    ] = None,
    update_in_backward: Annotated[
        bool | None,
        _option(
            "--update-in-backward/--no-update-in-backward",
            "Free each gradient as soon as it is used.",
            _RUN,
        ),
    ] = None,
    clip: Annotated[
        float | None, _option("--clip", "Largest gradient norm; 0: none.", _RUN)
    ] = None,
    clipping: Annotated[
        str | None, _option("--clipping", "Whose norm: whole, inside, each.", _RUN)
    ] = None,
    ranks: Annotated[
        int | None, _option("--ranks", "Devices that FSDP2 shards over.", _RUN)
    ] = None,
    device: Annotated[
        str | None, _option("--device", "cuda or cpu: how the step is batched.", _RUN)
    ] = None,
    budget: Annotated[
        str | None, _option("--budget", "Search what fits: 24GB (10^9) or 22GiB (2^30).", _OUT)
    ] = None,
    measure: Annotated[bool, _option("--measure", "Run one real step and compare.", _OUT)] = False,
    json_file: Annotated[Path | None, _option("--json", "Write the numbers.", _OUT)] = None,
    picture: Annotated[
        Path | None, _option("--picture", "Draw stacked bars: .svg or .png.", _OUT)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Plan the memory of training, without weights and without a GPU."""
    from subspan.plan.budget import parse_size
    from subspan.plan.request import read_request

    limit = parse_size(budget) if budget is not None else None
    flags = {k: v for k, v in context.params.items() if k not in _NOT_FLAGS}
    request = read_request(flags, config, searches=limit is not None)
    out = console(quiet)

    from subspan.plan import show
    from subspan.plan.job import run_plan
    from subspan.plan.picture import write_picture
    from subspan.train.files import write_json

    with out.status("planning") as status:
        result = run_plan(request, limit, measure, lambda name: status.update(f"planning: {name}"))
    if result.outcome is not None:
        out.print(show.found(result.outcome), soft_wrap=True)
    elif len(request.methods) == 1:
        out.print(show.one_plan(result.plans[0]), soft_wrap=True)
    else:
        out.print(show.many_plans(result.plans, result.failed), soft_wrap=True)
    if result.comparison is not None:
        out.print(show.measured(result.comparison), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, result.as_dict())
    if picture is not None:
        write_picture(picture, result.plans, limit)
