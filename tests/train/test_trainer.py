"""SubspanTrainer and the plug for a plain Trainer: groups, settings, checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import subspan.optim
from subspan.train import checkpoints
from subspan.train.errors import JobError
from subspan.train.trainer import SubspanTrainer, build_optimizer, optimizer_cls_and_kwargs


def model(width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    base: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **(base | changes))


def sequences() -> list[dict[str, torch.Tensor]]:
    numbers = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 64, (12, 8), generator=numbers)
    return [{"input_ids": row, "labels": row} for row in rows]


def weights(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_settings_of_the_arguments_reach_every_group(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-7)
    built = model()
    optimizer = build_optimizer(built, "galore", args, plain_lr=0.002, rank=4)
    names = {id(p): name for name, p in built.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-7
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            projected = name.endswith("proj.weight")
            assert group["lr"] == (0.01 if projected else 0.002), name
            undecayed = "norm" in name or name.endswith("bias")
            assert group["weight_decay"] == (0.0 if undecayed else 0.1), name
    assert seen == set(names.values())


def test_given_hyper_parameters_win_over_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1)
    optimizer = build_optimizer(model(), "adamw", args, lr=0.5, weight_decay=0.0, eps=1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-3}


def test_unknown_method_and_option_are_refused_before_training(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="galor"):
        optimizer_cls_and_kwargs(model(), "galor", args)
    with pytest.raises(TypeError, match="rnk"):
        optimizer_cls_and_kwargs(model(), "galore", args, rnk=8)
    with pytest.raises(ValueError, match="rank"):
        optimizer_cls_and_kwargs(model(), "galore", args, rank=0)


@pytest.mark.parametrize("method", ["adamw", "galore", "fira"])
def test_plain_trainer_with_the_plug_equals_subspan_trainer(tmp_path: Path, method: str) -> None:
    hyper = {} if method == "adamw" else {"rank": 4, "update_proj_gap": 2}
    first, second = model(), model()
    args = arguments(tmp_path, save_strategy="no")
    plug = optimizer_cls_and_kwargs(first, method, args, **hyper)
    Trainer(first, args, train_dataset=sequences(), optimizer_cls_and_kwargs=plug).train()
    SubspanTrainer(second, args, train_dataset=sequences(), method=method, hyper=hyper).train()
    assert_equal(weights(first), weights(second))


def test_plain_trainer_resumes_exactly(tmp_path: Path) -> None:
    results = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        built = model()
        plug = optimizer_cls_and_kwargs(built, "galore", rank=4, update_proj_gap=3)
        trainer = Trainer(
            built, arguments(folder), train_dataset=sequences(), optimizer_cls_and_kwargs=plug
        )
        if stop:
            trainer.train(resume_from_checkpoint=str(tmp_path / "False" / "checkpoint-4"))
        else:
            trainer.train()
        results.append(weights(built))
    assert_equal(*results)


def trainer(folder: Path, built: nn.Module | None = None, **changes: Any) -> SubspanTrainer:
    settings: dict[str, Any] = {"method": "galore", "hyper": {"rank": 4}} | changes
    return SubspanTrainer(
        built or model(), arguments(folder), train_dataset=sequences(), **settings
    )


def test_torn_checkpoints_are_skipped(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    expected = weights(whole.model)
    last = tmp_path / "checkpoint-6"
    state = last / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    (tmp_path / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-2"
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(expected, weights(resumed.model))
    with pytest.raises(JobError, match="no complete checkpoint"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fira"}, "was written by method galore, this run uses fira"),
        ({"hyper": {"rank": 2}}, "was written with rank=4, this run has rank=2"),
        ({"plain_lr": 1.0}, "was written with plain_lr=None, this run has plain_lr=1.0"),
        ({"built": model(16)}, "belongs to a model with other parameter shapes"),
    ],
)
def test_checkpoint_of_another_run_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    trainer(tmp_path).train()
    with pytest.raises(JobError, match=re.escape(message)) as error:
        trainer(tmp_path, **changes).train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert "checkpoint-6" in str(error.value)


def test_failed_save_removes_its_part_and_keeps_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def save(value: Any, file: Any, *rest: Any, **more: Any) -> None:
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            raise OSError(28, "No space left on device")
        real(value, file, *rest, **more)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space"):
        trainer(tmp_path).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_failed_write_on_a_full_disk_is_told_from_other_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise RuntimeError("unexpected pos 403456 vs 403344")  # What torch says of a full disk.

    def no_space(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        trainer(tmp_path).train()
    monkeypatch.setattr("subspan.train.trainer.check_space", no_space)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path).train()
    assert list(tmp_path.iterdir()) == []


def test_old_checkpoints_go_only_after_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = []
    real = checkpoints.commit

    def commit(folder: Path, about: dict[str, Any]) -> None:
        present.append(sorted(p.name for p in tmp_path.iterdir()))
        real(folder, about)

    monkeypatch.setattr(checkpoints, "commit", commit)
    limited = trainer(tmp_path)
    limited.args.save_total_limit = 1
    limited.train()
    assert present[1] == ["checkpoint-2", "checkpoint-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.mark.parametrize("method", sorted(subspan.optim.methods()))
def test_every_method_is_built_from_training_arguments(method: str, tmp_path: Path) -> None:
    small = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    optimizer = build_optimizer(small, method, args)
    small(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in small.parameters())
