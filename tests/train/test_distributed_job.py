"""The same job on several processes (gloo): same result, survival of a kill, one model at the end.

Each test starts torchrun or accelerate, which takes about ten seconds, so each looks at much.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from subspan.train.checkpoints import last_complete
from subspan.train.config import TrainConfig
from subspan.train.distributed import check, evaluation_batch, training_batch
from subspan.train.errors import JobError
from subspan.train.job import run_job
from subspan.train.metrics import read_metrics
from subspan.train.progress import RunProgress
from subspan.train.race.config import CompareConfig
from subspan.train.race.race import compare
from subspan.train.yamlfile import dump_yaml

Settings = Callable[..., TrainConfig]

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("seconds", "optimizer_seconds")
# Sums in another order, amplified by twelve steps: measured 5e-6.
CLOSE = 1e-5

# Rank 1 of the first attempt dies in the middle of step 11: after its backward pass.
DYING = """
import faulthandler, os, signal

faulthandler.dump_traceback_later(80, exit=True)  # A hang shows where.

from subspan.cli import main
from subspan.train.callbacks import Metrics

real = Metrics.on_pre_optimizer_step

def dying(self, args, state, *rest, **named):
    attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if state.global_step == 10 and attempt == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, args, state, *rest, **named)

Metrics.on_pre_optimizer_step = dying
main()
"""


def launch(*command: object, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "500"}
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # The launcher ends its processes, which have sessions of their own.
        output, _ = process.communicate()
        raise AssertionError(f"not finished within {timeout} s:\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def torchrun(ranks: int, *command: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    options = ("--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}")
    return launch("torch.distributed.run", *options, *command)


def written(config: TrainConfig, **changes: Any) -> Path:
    """A configuration file for the command line."""
    changed = config.model_copy(update=changes)
    path = Path(changed.output).with_suffix(".yaml")
    path.write_text(dump_yaml(changed.model_dump(mode="json")))
    return path


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_close_run(folder: Path, expected: Path) -> None:
    lines, wanted = timeless(folder), timeless(expected)
    assert len(lines) == len(wanted)
    for line, other in zip(lines, wanted, strict=True):
        assert line == pytest.approx(other, rel=CLOSE)
    weights, others = (load_file(f / "final" / "model.safetensors") for f in (folder, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (weight - others[name]).norm() <= CLOSE * others[name].norm(), name


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda number: monkeypatch.setenv("WORLD_SIZE", str(number))


def test_batch_is_shared_equally_or_refused(
    settings: Settings, processes: Callable[[int], None]
) -> None:
    config = settings(batch_size=12)
    processes(4)
    assert training_batch(config) == 3
    processes(5)
    with pytest.raises(JobError, match="batch_size=12 cannot be divided among 5 processes"):
        check(config)


def test_evaluation_batch_divides_the_sequences(
    settings: Settings, processes: Callable[[int], None]
) -> None:
    config = settings(batch_size=16)
    assert evaluation_batch(config, 15) == 16
    processes(2)
    assert [evaluation_batch(config, n) for n in (16, 15, 14, 12, 13)] == [8, 5, 7, 6, 1]


@pytest.mark.parametrize("field", ["int8_weights", "update_in_backward", "compile"])
def test_what_works_in_one_process_only_is_refused(
    settings: Settings, processes: Callable[[int], None], field: str
) -> None:
    config = settings(**{field: True})
    check(config)
    processes(2)
    with pytest.raises(JobError, match=f"{field} works in one process, not in 2"):
        check(config)


@pytest.mark.parametrize(("name", "value"), [("VERSION", "1"), ("OFFLOAD_PARAMS", "true")])
def test_settings_of_accelerate_that_would_be_ignored_are_refused(
    settings: Settings,
    processes: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    processes(2)
    check(settings())
    monkeypatch.setenv(f"FSDP_{name}", value)
    with pytest.raises(JobError, match=f"(?i)accelerate configuration.*set|fsdp_{name}"):
        check(settings())


def test_projected_gradients_are_refused_where_they_would_change_the_run(
    settings: Settings,
) -> None:
    with pytest.raises(JobError, match="projected_gradients needs parallel=ddp"):
        settings(projected_gradients=True, clip=0)
    with pytest.raises(JobError, match="projected_gradients needs clip=0"):
        settings(projected_gradients=True, parallel="ddp")


def test_comparison_is_refused_under_torchrun(processes: Callable[[int], None]) -> None:
    processes(2)
    with pytest.raises(JobError, match="run it without torchrun"):
        compare(CompareConfig(arms={"galore": {}}))


def test_the_way_of_spreading_is_no_part_of_what_a_run_is(settings: Settings) -> None:
    ways = [{}, {"parallel": "ddp"}, {"parallel": "ddp", "projected_gradients": True}]
    first, *others = (settings(clip=0, **way).identity() for way in ways)
    assert all(other == first for other in others)


@pytest.mark.distributed
@pytest.mark.slow
def test_accelerate_launch_with_fsdp2_gives_the_result_of_one_process(
    settings: Settings, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = settings(output=str(tmp_path / "one"), accumulation=2)
    one = run_job(config)
    folder = tmp_path / "two"
    ended = launch(
        *("accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate_fsdp2.yaml"),
        *("--num_processes", 2, "--module", "subspan", "train"),
        *("--config", written(config, output=str(folder))),
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("validation loss") == 1  # Only one process speaks.
    assert_close_run(folder, tmp_path / "one")
    technical = {".lock", "report.html"}  # The command writes a report, the function does not.
    names = [{p.name for p in f.iterdir()} - technical for f in (folder, tmp_path / "one")]
    assert names[0] == names[1]
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"] == 2
    # Moments are cut in two (but for odd sizes), bases are on both.
    assert result["state_bytes"]["total"] < 0.55 * one["state_bytes"]["total"]
    with safe_open(folder / "final" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder / "final", output_loading_info=True
    )
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == model.config.vocab_size
    configs = [
        json.loads((f / "final/config.json").read_text()) for f in (folder, tmp_path / "one")
    ]
    assert configs[0] == configs[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_run_that_lost_a_process_goes_on_with_any_number_of_them(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings(output=str(tmp_path / "whole"), method="fira", lr=0.003)
    run_job(whole)
    cut = whole.model_copy(update={"output": str(tmp_path / "cut")})
    # One process to step 5, which leaves its checkpoint 4.
    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "step", _interrupt_at_five)
        with pytest.raises(KeyboardInterrupt):
            run_job(cut)
    # Two processes go on from there; one dies, and the other ends and says why.
    dying = tmp_path / "dying.py"
    dying.write_text(DYING)
    started = time.monotonic()
    ended = torchrun(2, dying, "train", "--config", written(cut))
    assert ended.returncode != 0
    assert time.monotonic() - started < 60
    assert "going on from step 4" in ended.stdout
    assert "the same command goes on from the last" in ended.stdout
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert last_complete(checkpoints) == checkpoints / "checkpoint-8"
    assert not (tmp_path / "cut" / "final").exists()
    # A part of a checkpoint, as a kill during saving leaves it, is not taken for one.
    shutil.copytree(checkpoints / "checkpoint-8", checkpoints / "checkpoint-9")
    (checkpoints / "checkpoint-9" / "subspan.json").unlink()
    four = whole.model_copy(update={"output": str(tmp_path / "four")})
    shutil.copytree(tmp_path / "cut", tmp_path / "four")
    run_job(cut)
    assert_close_run(tmp_path / "cut", tmp_path / "whole")
    ended = torchrun(4, "-m", "subspan", "train", "--config", written(four))
    assert ended.returncode == 0, ended.stdout
    assert "going on from step 8" in ended.stdout
    assert_close_run(tmp_path / "four", tmp_path / "whole")


def _interrupt_at_five(_: RunProgress, number: int) -> None:
    if number == 5:
        raise KeyboardInterrupt


@pytest.mark.distributed
@pytest.mark.slow
def test_elastic_restart_finishes_a_run_of_ddp_with_projected_gradients(
    settings: Settings, tmp_path: Path
) -> None:
    config = settings(output=str(tmp_path / "one"), clip=0, parallel="ddp")
    run_job(config)
    elastic = written(config, output=str(tmp_path / "two"), projected_gradients=True)
    dying = tmp_path / "dying.py"
    dying.write_text(DYING)
    ended = torchrun(2, dying, "train", "--config", elastic, restarts=1)
    assert ended.returncode == 0, ended.stdout
    assert "going on from step 8" in ended.stdout
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):  # The norms are those of whole and of projected gradients.
        lines = read_metrics(folder / "metrics.jsonl")
        assert all(math.isfinite(line.pop("grad_norm", 0.0)) for line in lines)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_close_run(two, one)


def test_model_is_written_in_files_of_bounded_size_and_tied_weights_once(tmp_path: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, LlamaConfig

    from subspan.train.shards import write_model

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(num_hidden_layers=1, vocab_size=100, tie_word_embeddings=True, **size)
    )
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        folder = tmp_path / "final"
        folder.mkdir()
        write_model(model, folder, file_bytes=20_000)
    finally:
        dist.destroy_process_group()
    model.config.save_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 22_000 for file in files)  # with its header
    assert not (folder / "sharded").exists()
    held = [name for file in files for name in load_file(file)]
    assert sorted([*held, "lm_head.weight"]) == sorted(expected)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
