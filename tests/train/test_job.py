"""One run from configuration to result: files, exactness of resume, refusals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspan.train import callbacks, job
from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.job import run_job
from subspan.train.metrics import read_metrics
from subspan.train.progress import RunProgress
from subspan.train.yamlfile import dump_yaml

Settings = Callable[..., TrainConfig]

TIMES = ("seconds", "optimizer_seconds")


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    assert timeless(first) == timeless(second)
    one, two = (load_file(folder / "final" / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Interrupts the run after a step, before that step is logged or saved."""
    real = RunProgress.step

    def install(last: int | None) -> None:
        def step(self: RunProgress, number: int) -> None:
            real(self, number)
            if number == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(RunProgress, "step", step)

    return install


def test_run_folder_holds_everything_that_is_promised(settings: Settings) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = settings(track=["tensorboard"])
    result = run_job(config)
    folder = Path(config.output)
    assert result == json.loads((folder / "result.json").read_text())
    assert {
        "config.yaml",
        "inputs.json",
        "metrics.jsonl",
        "checkpoints",
        "final",
        "tensorboard",
    } <= {path.name for path in folder.iterdir()}
    lines = read_metrics(folder / "metrics.jsonl")
    # A line every 3 steps and at every checkpoint (every 4), an evaluation every 6.
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 6, 8, 9, 12]
    assert [line["step"] for line in lines if "perplexity" in line] == [6, 12]
    assert all(line["tokens"] == line["step"] * 4 * 32 for line in lines)
    assert lines[-1]["validation_loss"] == result["validation_loss"] < lines[3]["validation_loss"]
    assert result["state_bytes"]["total"] == sum(
        size for kind, size in result["state_bytes"].items() if kind != "total"
    )
    assert result["state_bytes"]["basis"] > 0
    assert 50e6 < result["peak_memory_bytes"]["process"] < 5e9
    assert result["versions"]["torch"] == torch.__version__
    assert list((folder / "tensorboard").iterdir())
    for saved in (folder / "final", folder / "checkpoints" / "checkpoint-12"):
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert model.config.hidden_size == 32
        assert len(AutoTokenizer.from_pretrained(saved)) == model.config.vocab_size


def test_learning_rate_warms_up_and_ends_at_its_ratio(settings: Settings) -> None:
    config = settings(steps=20, warmup=5, log_every=1, min_lr_ratio=0.1, lr=0.02)
    run_job(config)
    lines = read_metrics(Path(config.output) / "metrics.jsonl")
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[:5] == pytest.approx([0.004, 0.008, 0.012, 0.016, 0.02])
    assert rates[-1] == pytest.approx(0.002)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize("method", ["adamw", "galore", "fira"])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    settings: Settings, tmp_path: Path, stop_at: Callable[[int | None], None], method: str
) -> None:
    common: dict[str, Any] = {"method": method, "accumulation": 2, "plain_lr": 0.003}
    if method == "adamw":
        common |= {"rank": None, "update_proj_gap": None}
    whole, cut = (settings(output=str(tmp_path / name), **common) for name in ("whole", "cut"))
    run_job(whole)
    # Steps 7 and 11 lie between checkpoints 4, 8 and 12, and on both sides of a refresh.
    for last in (7, 11):
        stop_at(last)
        with pytest.raises(KeyboardInterrupt):
            run_job(cut)
    stop_at(None)
    result = run_job(cut)
    assert_same_run(Path(whole.output), Path(cut.output))
    assert result["steps"] == 12


def test_run_interrupted_after_its_last_step_is_finished_by_the_next_call(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (settings(output=str(tmp_path / name)) for name in ("whole", "cut"))
    run_job(whole)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "_save_final", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(cut)
    run_job(cut)
    assert_same_run(Path(whole.output), Path(cut.output))


@pytest.mark.slow
def test_run_killed_at_any_time_resumes_to_the_same_end(settings: Settings, tmp_path: Path) -> None:
    whole = settings(output=str(tmp_path / "whole"), steps=40, checkpoint_every=3)
    run_job(whole)
    cut = whole.model_copy(update={"output": str(tmp_path / "cut")})
    file = tmp_path / "cut.yaml"
    file.write_text(dump_yaml(cut.model_dump(mode="json")))
    command = [sys.executable, "-m", "subspan", "train", "--quiet", "--config", str(file)]
    metrics = Path(cut.output) / "metrics.jsonl"
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (Path(cut.output) / "result.json").exists()
    subprocess.run(command, check=True)
    assert_same_run(Path(whole.output), Path(cut.output))


def test_methods_start_from_the_same_weights_and_see_the_same_text(
    settings: Settings, tmp_path: Path
) -> None:
    inputs = []
    first_losses = []
    for method in ("galore", "fira"):
        config = settings(method=method, output=str(tmp_path / method), steps=2, log_every=1)
        inputs.append(run_job(config)["inputs"])
        first_losses.append(timeless(Path(config.output))[0]["loss"])
    assert inputs[0] == inputs[1]
    assert first_losses[0] == first_losses[1]


def test_finished_run_says_so_and_is_not_run_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    result = run_job(config)
    monkeypatch.setattr(job, "prepare", None)  # A second training would fail.
    assert run_job(config) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, "(lr is 0.01 there, 0.5 here)"),
        ({"method": "fira"}, "(method is galore there, fira here)"),
        ({"data": {"vocab_size": 310}}, "(data.vocab_size is 300 there, 310 here)"),
    ],
)
def test_folder_of_another_run_is_refused_and_untouched(
    settings: Settings, stop_at: Callable[[int | None], None], change: dict, message: str
) -> None:
    config = settings()
    stop_at(7)
    with pytest.raises(KeyboardInterrupt):
        run_job(config)
    folder = Path(config.output)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(JobError) as error:
        run_job(settings(**change))
    assert message in str(error.value)
    assert "holds another run" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_folder_with_other_files_is_refused(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(JobError, match="holds other files"):
        run_job(settings())
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    with pytest.raises(JobError, match="is a file"):
        run_job(settings(output=str(folder / "thesis.txt")))


def test_run_does_not_go_on_with_other_text(
    settings: Settings, tmp_path: Path, text: Path, stop_at: Callable[[int | None], None]
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    config = settings(data={"corpus": str(own)})
    stop_at(7)
    with pytest.raises(KeyboardInterrupt):
        run_job(config)
    own.write_text(text.read_text() + "More text.")
    with pytest.raises(JobError, match="has changed since the run began"):
        run_job(config)


def test_second_process_is_refused_while_the_first_runs(settings: Settings) -> None:
    config = settings()
    with (
        job.runfolder.locked(Path(config.output)),
        pytest.raises(JobError, match="in use by another process"),
    ):
        run_job(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "galor"}, "method='galor' is not known (did you mean 'galore'?)"),
        ({"method_options": {"sclae": 1}}, "GaLore has no option 'sclae' (did you mean 'scale'?)"),
        ({"method_options": {"proj_type": "up"}}, "up"),
        ({"method": "adamw"}, "AdamW has no option 'rank'"),
        ({"model": "llama-2b"}, "unknown model 'llama-2b'"),
        ({"data": {"corpus": "wikitext"}}, "unknown corpus 'wikitext'"),
        ({"data": {"corpus": "none.txt"}}, "text file none.txt does not exist"),
        ({"data": {"tokenizer": "none"}}, "tokenizer folder none does not exist"),
        ({"batch_size": 100_000}, "too little text"),
        ({"project": ["no_such_layer"]}, "no_such_layer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(
    settings: Settings, change: dict, message: str
) -> None:
    config = settings(**change)
    with pytest.raises(JobError) as error:
        run_job(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(config.output).exists()


def test_full_disk_is_one_line_and_the_run_goes_on_later(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings(output=str(tmp_path / "whole"))
    run_job(whole)
    config = settings()
    real = torch.save

    def save(value: Any, file: Any, *rest: Any, **more: Any) -> None:
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device", str(file))
        real(value, file, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(JobError, match=r"is full; free space") as error:
            run_job(config)
    assert "\n" not in str(error.value)
    checkpoints = Path(config.output) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]
    run_job(config)
    assert_same_run(Path(whole.output), Path(config.output))


def test_divergence_is_one_line_with_the_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = callbacks.Metrics.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.global_step == 9 and "loss" in logs:
            logs = logs | {"loss": float("nan")}
        real(self, args, state, control, logs=logs)

    monkeypatch.setattr(callbacks.Metrics, "on_log", on_log)
    with pytest.raises(JobError, match="training diverged: loss is nan at step 9; lower lr"):
        run_job(settings())


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16-mixed"])
def test_other_number_formats_train(settings: Settings, dtype: str) -> None:
    config = settings(dtype=dtype, steps=4, eval_every=2)
    run_job(config)
    saved = load_file(Path(config.output) / "final" / "model.safetensors")
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {value.dtype for value in saved.values()} == {expected}
