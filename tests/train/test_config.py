"""Configuration: defaults, limits, and errors that name key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from subspan.train.config import TrainConfig, parse
from subspan.train.errors import JobError
from subspan.train.overrides import fields, train_config
from subspan.train.race.config import CompareConfig, compare_config
from subspan.train.yamlfile import dump_yaml, load_yaml, merge


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse(TrainConfig, {"rank": 0.25, "lr": 1e-5, "data": {"vocab_size": 512}}, "x")
    (tmp_path / "c.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert parse(TrainConfig, load_yaml(tmp_path / "c.yaml"), "x") == config


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_every_way_to_write_a_rate_is_a_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"lr: {text}\n")
    assert load_yaml(tmp_path / "c.yaml") == {"lr": 0.001}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown key learning_rate; known: output, model"),
        ({"data": {"vocab": 1}}, "unknown key data.vocab; known: corpus"),
        ({"lr": -1}, "lr=-1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -0.5}, "rank=-0.5"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"steps": 0}, "steps=0"),
        ({"data": {"sequence_length": 1}}, "data.sequence_length=1"),
        ({"steps": 5, "tokens": 5}, "steps and tokens are both given"),
        ({"steps": 5, "warmup": 6}, "warmup=6 steps is longer than the run of 5 steps"),
    ],
)
def test_bad_value_is_one_line_with_its_key(values: dict, message: str) -> None:
    with pytest.raises(JobError) as error:
        parse(TrainConfig, values, "file.yaml")
    assert str(error.value).startswith("file.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_token_budget_is_rounded_up_to_whole_steps() -> None:
    values = {"tokens": 1000, "batch_size": 3, "accumulation": 2, "data": {"sequence_length": 32}}
    config = parse(TrainConfig, values, "x")
    assert config.tokens_per_step == 192
    assert config.total_steps == 6


def test_warmup_is_steps_or_a_share() -> None:
    assert parse(TrainConfig, {"steps": 40, "warmup": 0.1}, "x").warmup_steps == 4
    assert parse(TrainConfig, {"steps": 40, "warmup": 7}, "x").warmup_steps == 7
    assert parse(TrainConfig, {"steps": 40, "warmup": 0}, "x").warmup_steps == 0


def test_option_with_a_field_of_its_own_is_refused_among_method_options() -> None:
    config = parse(TrainConfig, {"method_options": {"lr": 1}}, "x")
    with pytest.raises(JobError, match=r"method_options\.lr"):
        config.hyper()


def test_identity_ignores_where_a_run_is_written_and_nothing_else() -> None:
    base = TrainConfig()
    assert (
        base.identity()
        == TrainConfig(output="elsewhere", track=[], record_subspaces=True).identity()
    )
    assert base.identity() != TrainConfig(seed=1).identity()


def test_merge_goes_into_mappings_and_later_layers_win() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {
        "a": {"b": 3, "c": 2},
        "d": 4,
    }


def test_flags_override_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 0.1\nseed: 3\ndata: {vocab_size: 512}\n")
    given = fields({"lr": 0.2, "rank": "0.5", "corpus": ("a.txt",), "steps": None}, ["seed=4"])
    config = train_config(tmp_path / "c.yaml", given)
    assert (config.lr, config.seed, config.rank) == (0.2, 4, 0.5)
    assert (config.data.corpus, config.data.vocab_size) == ("a.txt", 512)


@pytest.mark.parametrize("setting", ["seed", "=1", "seed=[1"])
def test_malformed_setting_is_one_line(setting: str) -> None:
    with pytest.raises(JobError, match="--set"):
        fields({}, [setting])


def test_missing_and_malformed_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"cannot read configuration .*none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(JobError, match="not valid YAML"):
        load_yaml(bad)
    bad.write_text("- 1")
    with pytest.raises(JobError, match="must be a mapping"):
        load_yaml(bad)


def test_arm_takes_the_jobs_fields_and_its_own(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text("job: {plain_lr: 0.01, data: {vocab_size: 512}}\narms: {fira: {lr: 0.5}}\n")
    config = compare_config(file, {"seed": 2, "output": str(tmp_path / "out")})
    arm = config.arm("fira")
    assert (arm.method, arm.lr, arm.plain_lr, arm.seed) == ("fira", 0.5, 0.01, 2)
    assert arm.output == str(tmp_path / "out" / "fira")


def test_output_of_an_arm_is_refused() -> None:
    with pytest.raises(JobError, match="output is set by the comparison"):
        CompareConfig(job={"output": "x"}).arm("galore")


@pytest.mark.parametrize("name", ["demo.yaml", "demo-short.yaml"])
def test_shipped_configurations_are_valid_and_equal_but_for_the_method(name: str) -> None:
    file = Path(__file__).parents[2] / "configs" / name
    config = compare_config(file, {})
    arms = [config.arm(arm) for arm in config.arms]
    assert [arm.method for arm in arms] == ["adamw", "galore", "fira"]
    shared = {(a.plain_lr, a.betas, a.eps, a.weight_decay, a.total_steps, a.seed) for a in arms}
    assert len(shared) == 1
