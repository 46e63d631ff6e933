"""The command line: reads arguments, calls the library, shows what comes back.

Imports that take time stand inside the commands, so that `--help` and `--version` are instant.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from subspan import __version__
from subspan.train import flags

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


def _console(quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(quiet=quiet)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train large neural networks inside low-rank subspaces."""
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
    int8_weights: flags.Int8Weights = None,
    eval_every: flags.EvalEvery = None,
    checkpoint_every: flags.CheckpointEvery = None,
    seed: flags.Seed = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    threads: flags.Threads = None,
    compile_model: flags.Compile = None,
    tensorboard: flags.TensorBoard = None,
) -> None:
    """Train one model with one method; the same command goes on with an interrupted run."""
    from subspan.train.job import run_job
    from subspan.train.overrides import fields, train_config
    from subspan.train.yamlfile import dump_yaml

    given = {k: v for k, v in context.params.items() if k not in _NOT_FIELDS}
    given["compile"] = given.pop("compile_model")
    resolved = train_config(config, fields(given, setting or ()), resume)
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
    from subspan.train.files import write_text
    from subspan.train.overrides import compare_config, fields
    from subspan.train.watch import ConsoleWatcher
    from subspan.train.yamlfile import dump_yaml

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
    vocab_size: flags.Vocabulary = None,
    tokenizer: flags.Tokenizer = None,
    setting: Setting = None,
) -> None:
    """Count documents, characters and tokens of a corpus."""
    from subspan.report.corpora import statistics
    from subspan.train.data import prepare_data
    from subspan.train.overrides import fields, train_config

    given = {"corpus": corpus, "vocab_size": vocab_size, "tokenizer": tokenizer}
    resolved = train_config(None, fields(given, setting or ())).data
    _console().print(statistics(resolved, prepare_data(resolved)))


_INTERRUPTED = 130


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and a non-zero status."""
    from subspan.train.errors import JobError, one_line

    # A request to end is handled like Ctrl-C, so that the process of an arm ends with its parent.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(standalone_mode=False)
        if status == _INTERRUPTED:  # Some versions of typer turn the exception into a status.
            raise KeyboardInterrupt
    except JobError as error:
        _fail(one_line(error), status=2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on from the last checkpoint", status=_INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "subspan").startswith("subspan"):
            raise
        _fail(f"package {error.name} is missing; pip install 'subspan[train]'", status=2)
    except Exception as error:
        # Usage errors of the argument parser, which typer brings along under a private name.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{one_line(Exception(error.format_message()))} (see --help)", status=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(status if isinstance(status, int) else 0)
