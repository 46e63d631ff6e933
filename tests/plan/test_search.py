"""What a budget allows: the winner, the reasons of the losers, and the command."""

from __future__ import annotations

import shlex

import pytest
import typer

from subspan.cli import train
from subspan.optim import methods
from subspan.plan import ModelSpec, Outcome, Settings, make_plan, search
from subspan.plan.command import train_command
from subspan.plan.evidence import LOSSES, tier
from subspan.plan.search import _ways

METHODS = ("adamw", "galore", "apollo", "sgd")


@pytest.fixture
def base(folder) -> Settings:
    return Settings(ModelSpec(str(folder("llama", 9)), None, 64), batch_size=8)


def found(base: Settings, budget: int, names=METHODS, **more: bool) -> Outcome:
    return search(base, names, budget, lambda method: {}, **more)


def test_where_everything_fits_the_best_is_adamw_without_compromise(base):
    outcome = found(base, 10**9)
    assert outcome.best.method == "adamw" and outcome.best.way.compromises == ()
    assert [item.fits for item in outcome.found] == [True] * 4
    assert all(item.reason.startswith("fits") for item in outcome.found[1:])


def test_less_memory_never_means_fewer_compromises(base):
    most = 0
    plain = make_plan(Settings(base.model, "galore", {"rank": 16}, batch_size=8)).needed
    for share in (1.01, 0.8, 0.6, 0.4):
        item = found(base, int(plain * share), ("galore",)).found[0]
        assert item.plan.needed <= plain * share or not item.fits
        if item.fits:
            assert len(item.way.compromises) >= most
            most = len(item.way.compromises)
    assert most >= 1


def test_the_chosen_way_has_the_fewest_compromises_of_those_that_fit(base):
    from dataclasses import replace

    start = replace(base, method="galore")
    plans = [(way, make_plan(way.settings).needed) for way in _ways(start, True, True)]
    for budget in sorted({needed for _, needed in plans})[:: len(plans) // 5]:
        fewest = min(len(way.compromises) for way, needed in plans if needed <= budget)
        assert len(found(base, budget, ("galore",)).best.way.compromises) == fewest


def test_where_nothing_fits_the_closest_and_what_would_have_to_give_are_named(base):
    outcome = found(base, 200_000)
    assert outcome.best is None
    needed = [item.plan.needed for item in outcome.found]
    assert needed == sorted(needed)
    assert all("too much" in item.reason for item in outcome.found)
    assert any("--ranks" in remedy for remedy in outcome.remedies)
    assert any("--int8-weights" in remedy for remedy in outcome.remedies)


def test_what_the_user_chose_is_not_searched(base):
    outcome = search(
        base, ("galore",), 10**9, lambda method: {"rank": 4}, free_rank=False, free_storage=False
    )
    assert dict(outcome.best.way.settings.options) == {"rank": 4}


def test_a_refused_method_says_why_and_the_others_are_still_there(base):
    outcome = search(
        base, ("galore", "adamw"), 10**9, lambda m: {"rank": 4} if m == "adamw" else {}
    )
    assert [item.method for item in outcome.found] == ["galore", "adamw"]
    assert "no option 'rank'" in outcome.found[1].reason


def test_every_registered_method_has_evidence():
    assert set(LOSSES) == set(methods())
    assert tier("adamw") == tier("galore") == 0 and tier("badam") == 1 and tier("sgd") == 2
    assert tier("a method of tomorrow") == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "galore", "options": {"rank": 8, "storage": "int8"}},
        {"update_in_backward": True, "clipping": "each", "accumulation": 1},
        {"accumulation": 4, "clip": 0.5},
        {"checkpointing": "full"},
        {"method": "galore", "options": {"rank": 8, "storage": {"basis": "int4"}}},
    ],
)
def test_the_command_trains_just_what_was_planned(base, changes, monkeypatch):
    from dataclasses import replace

    settings = replace(base, **{"method": "adamw", **changes})
    command, remarks = train_command(settings)
    words = shlex.split(command)
    assert words[:2] == ["subspan", "train"] and not remarks

    class Started(Exception):
        pass

    def run_job(config, *_, **__):
        raise Started(config)

    monkeypatch.setattr("subspan.train.job.run_job", run_job)
    app = typer.Typer()
    app.command()(train.train)
    with pytest.raises(Started) as started:
        app(words[2:], standalone_mode=False)
    (config,) = started.value.args
    assert (config.method, config.dtype) == (settings.method, settings.model.dtype)
    assert (config.batch_size, config.accumulation) == (settings.batch_size, settings.accumulation)
    assert (config.clip, config.clipping) == (settings.clip, settings.clipping)
    assert config.update_in_backward == settings.update_in_backward
    assert config.activation_checkpointing == (settings.checkpointing == "full")
    assert config.data.sequence_length == 64 and config.data.vocab_size == 500
    hyper = {name: value for name, value in config.hyper().items() if name != "seed"}
    assert hyper == dict(settings.options)
