"""The command line: reads arguments, calls the library, shows what comes back.

Imports that take time stand inside the commands, so that `--help` and `--version` are instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from subspan import __version__

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="subspan",
    help="Train large neural networks inside low-rank subspaces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Built-in corpora and statistics of any corpus.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file.")]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any other field, such as data.text_field=body."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


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
TensorBoard = Annotated[
    bool | None,
    typer.Option("--tensorboard/--no-tensorboard", help="Write events.", rich_help_panel=_RUN),
]


def _console(quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(quiet=quiet)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"subspan {__version__}")
        raise typer.Exit


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile = None,
    output: Annotated[Path | None, typer.Option("--output", help="Run folder.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run in this folder.")
    ] = None,
    setting: Setting = None,
    quiet: Quiet = False,
    model: Model = None,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    vocab_size: Vocabulary = None,
    sequence_length: Length = None,
    method: Method = None,
    lr: Lr = None,
    plain_lr: PlainLr = None,
    rank: Rank = None,
    update_proj_gap: Gap = None,
    scale: Scale = None,
    weight_decay: Decay = None,
    steps: Steps = None,
    tokens: Tokens = None,
    batch_size: Batch = None,
    accumulation: Accumulation = None,
    warmup: Warmup = None,
    clip: Clip = None,
    eval_every: EvalEvery = None,
    checkpoint_every: CheckpointEvery = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    compile_model: Compile = None,
    tensorboard: TensorBoard = None,
) -> None:
    """Train one model with one method; the same command goes on with an interrupted run."""
    from subspan.train.config import dump_yaml
    from subspan.train.job import run_job
    from subspan.train.overrides import fields, train_config

    flags = {k: v for k, v in context.params.items() if k not in _NOT_FIELDS}
    flags["compile"] = flags.pop("compile_model")
    resolved = train_config(config, fields(flags, setting or ()), resume)
    console = _console(quiet)
    console.print(dump_yaml(resolved.model_dump(mode="json")), highlight=False, markup=False)
    result = run_job(resolved, console)
    console.print(
        f"validation loss {result['validation_loss']:.4f}, perplexity {result['perplexity']:.2f}; "
        f"everything is in {resolved.output}",
        highlight=False,
        soft_wrap=True,
    )


_NOT_FIELDS = ("config", "resume", "setting", "quiet")


@app.command()
def compare(
    config: ConfigFile = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Arms to run, separated by commas.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder.")] = None,
    setting: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods on the same job, one after the other; write a table and report.html."""
    from subspan.report import build_report, load_runs
    from subspan.report.terminal import failures, results_table
    from subspan.train.comparison import compare as run
    from subspan.train.comparison import plan_arms
    from subspan.train.config import dump_yaml
    from subspan.train.files import write_text
    from subspan.train.overrides import compare_config, fields
    from subspan.train.watch import ConsoleWatcher

    resolved = compare_config(config, fields({}, setting or ()), output)
    names = [name.strip() for name in methods.split(",")] if methods else None
    arms = plan_arms(resolved, names)
    console = _console(quiet)
    console.print(dump_yaml(resolved.model_dump(mode="json")), highlight=False, markup=False)
    with ConsoleWatcher(console, arms) as watcher:
        run(resolved, names, watcher)
    folder = Path(resolved.output)
    title, runs = load_runs([folder])
    write_text(folder / "report.html", build_report([folder]))
    console.print(results_table(runs, title))
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    failed = failures(runs)
    if failed:
        _fail("; ".join(failed), status=1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or comparisons.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="HTML file; default: in the first folder.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading.")] = None,
) -> None:
    """Write one self-contained HTML file on runs, finished or not."""
    from subspan.report import build_report, load_runs
    from subspan.report.terminal import results_table
    from subspan.train.files import write_text

    found, runs = load_runs(folders)
    file = output or folders[0] / "report.html"
    write_text(file, build_report(folders, title))
    console = _console()
    console.print(results_table(runs, title or found))
    console.print(f"report: {file}", highlight=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Method to describe.")] = None,
) -> None:
    """List the methods, or describe one: paper, defaults, parts."""
    from subspan.report.methods import description, listing
    from subspan.train.job import check_method

    shown = listing() if name is None else description(check_method(name, {}))
    _console().print(shown)


@data_app.command("list")
def data_list() -> None:
    """List the built-in corpora."""
    from subspan.report.corpora import listing

    _console().print(listing())


@data_app.command("stats")
def data_stats(
    corpus: Annotated[list[str], typer.Argument(help="Corpus as in `subspan train --corpus`.")],
    vocab_size: Vocabulary = None,
    tokenizer: Tokenizer = None,
    setting: Setting = None,
) -> None:
    """Count documents, characters and tokens of a corpus."""
    from subspan.report.corpora import statistics
    from subspan.train.data import prepare_data
    from subspan.train.overrides import fields, train_config

    flags = {"corpus": corpus, "vocab_size": vocab_size, "tokenizer": tokenizer}
    resolved = train_config(None, fields(flags, setting or ())).data
    _console().print(statistics(resolved, prepare_data(resolved)))


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and a non-zero status."""
    from subspan.train.errors import JobError, one_line

    try:
        status = app(standalone_mode=False)
    except JobError as error:
        _fail(one_line(error), status=2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last checkpoint", status=130)
    except ModuleNotFoundError as error:
        if (error.name or "subspan").startswith("subspan"):
            raise
        _fail(f"package {error.name} is missing; pip install 'subspan[train]'", status=2)
    except Exception as error:
        # Usage errors of the argument parser, which typer brings along under a private name.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{one_line(Exception(error.format_message()))} (see --help)", status=2)
    sys.exit(status if isinstance(status, int) else 0)
