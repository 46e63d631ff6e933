"""Which races are refused before anything runs, and with which words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspan.train import runfolder
from subspan.train.errors import JobError
from subspan.train.race import plan as module
from subspan.train.race.config import CompareConfig, compare_config
from subspan.train.race.plan import plan_race

Build = Callable[..., CompareConfig]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["adamw", "adamw"], "arm adamw is named twice"),
        (["galor"], "arm galor: method='galor' is not known"),
        (["../up"], "arm name '../up'"),
        ([""], "arm name ''"),
    ],
)
def test_bad_arms_are_refused(comparison: Build, methods: list[str], message: str) -> None:
    with pytest.raises(JobError) as error:
        plan_race(comparison(), methods)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "nothing to compare"),
        ({"arms": {"galore": {"rnk": 3}}}, "arm galore: unknown key rnk"),
        ({"arms": {"galore": {"output": "x"}}}, "arm galore: output is set by the comparison"),
        ({"arms": {"galore": {"model": "llama-2b"}}}, "arm galore: unknown model 'llama-2b'"),
        ({"arms": {"adamw": {}, "galore": {"steps": 20}}}, "(adamw 5,120, galore 2,560)"),
        ({"arms": {"adamw": {}, "galore": {"seed": 3}}}, "arms have different seeds [0, 3]"),
        ({"seeds": [0, 1], "arms": {"galore": {"seed": 3}}}, "seed is set by seeds"),
        ({"arms": {"galore": {"search": {"lr": [1]}}}}, "arm galore has a search; give"),
    ],
)
def test_unfair_and_bad_races_are_refused(
    comparison: Build, changes: dict[str, Any], message: str
) -> None:
    config = comparison(**changes)
    with pytest.raises(JobError) as error:
        plan_race(config)
    assert message in str(error.value)
    assert not Path(config.output).exists()


def arms(adamw: Any, galore: Any) -> dict[str, Any]:
    return {"adamw": {"search": adamw}, "galore": {"search": galore}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": arms({"lr": [0.1, 0.2]}, {"lr": [0.1, 0.2, 0.3]})},
            "arms have different numbers of trials (adamw 2, galore 3)",
        ),
        ({"search": {"trials": 5}}, "search.trials=5, but the grid of each arm has 4 trials"),
        ({"arms": {"adamw": {}}}, "arm adamw: nothing to search"),
        ({"arms": arms({"seed": [1]}, {"lr": [1]})}, "arm adamw: seed cannot be searched"),
        ({"arms": arms({"data.corpus": ["x"]}, {"lr": [1]})}, "data.corpus cannot be searched"),
        ({"arms": arms({"lr": [0.1, -1]}, {"lr": [1, 2]})}, "arm adamw, trial lr--1: lr=-1"),
        ({"arms": arms({"rank": [8]}, {"rank": [8]})}, "arm adamw: AdamW has no option 'rank'"),
        ({"arms": arms({"lr": [0.1, 0.1]}, {"lr": [1, 2]})}, "trial lr-0.1 is there twice"),
        ({"arms": arms({"lr": {"low": 1, "high": 2}}, {"lr": [1]})}, "arm adamw: search of lr"),
        ({"arms": arms({"lr": {"low": 2, "high": 1}}, {"lr": [1]})}, "low=2 must be below high=1"),
        (
            {"arms": {"adamw": {"eval_every": 8, "search": {"lr": [1]}}, "galore": {}}},
            "arm galore: nothing to search",
        ),
        (
            {
                "arms": {
                    "adamw": {"eval_every": 5, "search": {"lr": [1]}},
                    "galore": {"search": {"lr": [1]}},
                }
            },
            "arms have rungs at different steps (adamw [10, 25], galore [8, 24])",
        ),
        (
            {
                "search": {"sampler": "optuna", "trials": 3},
                "arms": arms({"lr": [-1, 1]}, {"lr": [1]}),
            },
            "trial lr--1",
        ),
    ],
)
def test_bad_searches_are_refused_with_the_numbers(
    searching: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError) as error:
        plan_race(searching(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_are_named_after_trial_and_seed_only_where_there_are_several(
    comparison: Build, searching: Build
) -> None:
    race = plan_race(comparison())
    arm = race.arms["galore"]
    assert race.run(arm, race.own_settings(arm), 0).folder == "galore"
    race = plan_race(comparison(seeds=[3, 5]))
    assert race.run(arm, race.own_settings(arm), 5).folder == "galore/lr-0.02/seed-5"
    race = plan_race(searching())
    run = race.run(race.arms["galore"], {"lr": 0.1, "method_options.proj_type": "std"}, 1)
    assert run.folder == "galore/lr-0.1-proj_type-std/seed-1"
    assert (run.config.lr, run.config.seed, run.config.rank) == (0.1, 1, 4)
    assert run.config.method_options == {"proj_type": "std"}
    assert run.config.output == str(race.folder / run.folder)


def test_workers_share_the_cores_and_given_threads_are_kept(
    comparison: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    job = comparison().job
    free = {name: value for name, value in job.items() if name != "threads"}
    for workers, threads in ((1, None), (2, 4), (3, 2), (16, 1)):
        race = plan_race(comparison(workers=workers, job=free))
        assert race.arms["galore"].base.threads == threads
    assert plan_race(comparison(workers=2, job=job)).arms["galore"].base.threads == 1
    assert plan_race(comparison(ray="local", job=free)).arms["galore"].base.threads == 1


def test_folder_of_another_run_is_refused(comparison: Build) -> None:
    config = comparison()
    arm = config.arm("galore")
    runfolder.write_config(Path(arm.output), arm.model_copy(update={"seed": 5}))
    with pytest.raises(JobError, match=r"arm galore: .*holds another run .seed is 5 there, 0 here"):
        plan_race(config)
    assert not (Path(config.output) / "adamw").exists()


def test_folder_of_a_comparison_without_search_is_refused_by_one_with_search(
    comparison: Build, searching: Build
) -> None:
    arm = comparison().arm("galore")
    runfolder.write_config(Path(arm.output), arm)
    with pytest.raises(JobError, match="holds a run of a comparison without search and seeds"):
        plan_race(searching())


def test_settings_of_the_comparison_and_of_the_job_are_told_apart(tmp_path: Path) -> None:
    given = {"workers": 2, "search": {"trials": 3}, "lr": 0.5, "output": "there", "seeds": [1]}
    config = compare_config(None, given)
    assert (config.workers, config.output, config.seeds) == (2, "there", [1])
    assert config.job == {"lr": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search": {"trails": 1}}, "unknown key search.trails; known: sampler, trials"),
        ({"search": {"sampler": "optuna"}}, "search: sampler=optuna needs trials"),
        ({"search": {"fields": {"lr": 3}}}, "search.fields=3: input should be a valid list"),
        ({"search": {"fields": {"lr": []}}}, "search.fields=[]: list should have at least 1"),
        ({"halving": {}}, "halving needs a search"),
        ({"search": {}, "halving": {"rungs": [0.5, 0.2]}}, "halving: rungs=[0.5, 0.2] must rise"),
        ({"search": {}, "halving": {"keep": 1.5}}, "halving.keep=1.5"),
        ({"seeds": [1, 1]}, "seeds=[1, 1] must differ"),
        ({"workers": 0}, "workers=0"),
        ({"clock": {"rounds": 1}}, "clock.rounds=1"),
    ],
)
def test_bad_fields_are_named_with_their_section(values: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as error:
        compare_config(None, values)
    assert message in str(error.value)


def test_shipped_perplexity_table_is_a_fair_race() -> None:
    file = Path(__file__).parents[3] / "configs" / "perplexity.yaml"
    race = plan_race(compare_config(file, {}))
    assert (race.trials, race.rungs, list(race.seeds)) == (4, (500, 1000), [0, 1, 2])
    assert {"adamw", "galore", "fira", "frugal", "apollo", "coap"} <= set(race.arms)
    for arm in race.arms.values():
        rates = [settings["lr"] for settings in arm.trials or ()]
        assert [b / a for a, b in itertools.pairwise(rates)] == [2, 2, 2]
        assert arm.base.lr in rates
    # For large models one run per arm, at the arm's own learning rate.
    once = compare_config(file, {"search": None, "halving": None, "seeds": [0]})
    assert plan_race(once).trials == 1
