"""Learning rates of the demo: a grid for each arm, on the demo's own job and validation text.

    python -m benchmarks.tune_demo --output runs/tune --arm adamw --lr 1e-3 2e-3 --plain-lr 5e-3

Every run is a run folder of `subspan train`, so an interrupted grid goes on where it stopped, and
a later call with other values adds to the table, which shows all runs in the folder.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from subspan.report.runs import Run, load_run
from subspan.train.config import TrainConfig, parse
from subspan.train.overrides import fields
from subspan.train.race.config import compare_config
from subspan.train.runfolder import CONFIG
from subspan.train.yamlfile import dump_yaml, load_yaml, merge

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def grid_run(arm: str, lr: float, plain_lr: float, options: argparse.Namespace) -> TrainConfig:
    """Configuration of one cell: the demo's arm with other learning rates, without extras."""
    name = "-".join([arm, f"lr{lr:g}", f"plain{plain_lr:g}", f"seed{options.seed}", *options.set])
    folder = options.output / name.replace("/", "_")
    base = (
        compare_config(options.config, {"output": str(options.output)})
        .arm(arm)
        .model_dump(mode="json")
    )
    changes = {
        "output": str(folder),
        "lr": lr,
        "plain_lr": plain_lr,
        "seed": options.seed,
        "threads": options.threads,
        "track": [],
        "checkpoint_every": 10**9,
    }
    return parse(TrainConfig, merge(base, changes, fields({}, options.set)), name)


def run(config: TrainConfig) -> str | None:
    """Train in a process of its own; returns the error line, if any."""
    folder = Path(config.output)
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(dump_yaml(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "subspan", "train", "--quiet", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    file.unlink()
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def table(runs: list[Run]) -> Table:
    """All finished runs, best first within each method."""
    shown = Table("method", "lr", "plain_lr", "seed", "loss", "perplexity", "other settings")
    keys = ("rank", "update_proj_gap", "scale", "method_options")
    done = [(run.config, run.result) for run in runs if run.config and run.result]
    for config, result in sorted(done, key=lambda r: (r[1]["method"], r[1]["validation_loss"])):
        values = {key: getattr(config, key) for key in keys}
        other = ", ".join(f"{key} {value}" for key, value in values.items() if value)
        row = (f"{config.lr:g}", f"{config.plain_lr:g}", str(config.seed))
        loss, perplexity = result["validation_loss"], result["perplexity"]
        shown.add_row(config.method, *row, f"{loss:.4f}", f"{perplexity:.2f}", other)
    return shown


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("--output", type=Path, default=Path("runs/tune"))
    parser.add_argument("--arm", action="append", default=[], help="may be repeated")
    parser.add_argument("--lr", type=float, nargs="+", default=[])
    parser.add_argument("--plain-lr", type=float, nargs="+", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1, help="threads of one run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    plain = options.plain_lr or [load_yaml(options.config)["job"]["plain_lr"]]
    cells = itertools.product(options.arm, options.lr, plain)
    configs = [grid_run(*cell, options) for cell in cells]
    console = Console()
    with ThreadPoolExecutor(options.jobs) as pool:
        for config, error in zip(configs, pool.map(run, configs), strict=True):
            console.print(f"{config.output}: {error or 'done'}", highlight=False, soft_wrap=True)
    folders = sorted(path.parent for path in options.output.glob(f"*/{CONFIG}"))
    console.print(table([load_run(folder) for folder in folders]))


if __name__ == "__main__":
    main()
