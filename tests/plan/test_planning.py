"""How accumulation, updates in the backward pass and sharding change a plan."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from subspan.optim import methods
from subspan.plan import ModelSpec, Settings, as_dict, make_plan
from subspan.plan.model import build_model, meta_model
from subspan.plan.parts import build_on
from subspan.train.errors import JobError

GALORE = {"rank": 8}


@pytest.fixture
def settings(folder) -> Settings:
    spec = ModelSpec(str(folder("llama", 9)), None, 64, "float32")
    return Settings(spec, "galore", GALORE, batch_size=2, device="cpu")


def test_a_peak_is_the_sum_of_its_parts(settings):
    for changed in (settings, replace(settings, ranks=4), replace(settings, accumulation=2)):
        made = make_plan(changed)
        peak = made.peak
        base = made.weights + made.buffers + made.state
        assert peak.total == base + peak.gradients + peak.activations + peak.temporary
        assert peak.total == max(made.moments.values())


def test_from_the_second_pass_of_a_step_all_gradients_exist(settings):
    one, two = make_plan(settings), make_plan(replace(settings, accumulation=2))
    assert two.peak.gradients == two.gradients == one.gradients
    assert two.needed > one.needed
    assert two.needed == make_plan(replace(settings, accumulation=8)).needed


def test_updates_in_the_backward_pass_hold_one_gradient(settings):
    settings = replace(settings, model=replace(settings.model, sequence_length=4), batch_size=1)
    plain = make_plan(settings)
    each = make_plan(replace(settings, update_in_backward=True, clipping="each"))
    largest = max(p.numel() for p in meta_model(settings.model).module.parameters())
    assert each.gradients == 4 * largest
    assert each.needed < plain.needed - plain.gradients / 2
    assert each.state == plain.state


def test_updates_that_wait_are_planned_with_all_gradients(settings):
    waiting = make_plan(replace(settings, update_in_backward=True))
    assert waiting.gradients == make_plan(settings).gradients
    assert any("at a refresh" in note for note in waiting.notes)


def test_gradients_made_by_rows_never_exist_whole(folder):
    model = ModelSpec("llama-60m", sequence_length=64)
    base = Settings(model, "galore", {"rank": 128}, batch_size=1, update_in_backward=True)
    whole = make_plan(replace(base, clipping="each"))
    rows = make_plan(replace(base, clip=0.0))
    assert whole.gradients == 2 * 32000 * 512
    assert rows.gradients == 2 * 1376 * 512
    assert rows.needed < whole.needed


def test_what_the_engine_refuses_is_refused(settings):
    fira = replace(settings, method="fira", update_in_backward=True)
    with pytest.raises(JobError, match="needs the whole gradient"):
        make_plan(fira)
    with pytest.raises(JobError, match="one process"):
        replace(settings, update_in_backward=True, ranks=2)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shares_of_all_devices_cover_the_whole(settings, ranks):
    whole = make_plan(replace(settings, method="adamw", options={}))
    shared = make_plan(replace(settings, method="adamw", options={}, ranks=ranks))
    assert whole.weights <= ranks * shared.weights < 1.2 * whole.weights
    assert whole.state <= ranks * shared.state < 1.2 * whole.state


def test_one_device_of_fsdp_gathers_two_blocks_and_the_rest(settings):
    made = make_plan(replace(settings, ranks=4))
    named = dict(meta_model(settings.model).module.named_parameters())
    block = sum(4 * p.numel() for name, p in named.items() if ".layers.0." in name)
    rest = sum(4 * p.numel() for name, p in named.items() if ".layers." not in name)
    assert made.shares.gathered == 2 * block + rest
    assert made.shares.unreduced == block


# Which rank holds the most, and what, as the engine itself says of sharded parameters on the meta
# device, with a process group that sends nothing.
SHARDED = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
import subspan.optim as optim
from subspan.plan.model import ModelSpec, build_model

folder, ranks, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
found = {name: [] for name in cases}
for rank in range(ranks):
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    for name, options in cases.items():
        model = build_model(ModelSpec(folder, None, 64, "float32"), "meta").module
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[name].append(optim.for_model(model, name, **options).memory())
    dist.destroy_process_group()
print(json.dumps(found))
"""


def _states(memory: dict[str, int]) -> dict[str, int]:
    kinds = ("first_moment", "second_moment", "basis", "error", "scalar")
    return {kind: memory[kind] for kind in kinds if memory.get(kind)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_fullest_device_holds_what_the_engine_says(settings, ranks):
    cases = {
        name: GALORE if isinstance(rank := recipe.defaults.get("rank"), int) and rank > 8 else {}
        for name, recipe in methods().items()
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, settings.model.source, str(ranks), json.dumps(cases)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, devices in json.loads(done.stdout.splitlines()[-1]).items():
        made = make_plan(replace(settings, method=name, options=cases[name], ranks=ranks), period=0)
        fullest = devices[made.shares.rank]
        assert {k: v for k, v in made.states.items() if v} == _states(fullest), name
        assert (made.weights, made.gradients) == (fullest["weights"], fullest["all_gradients"])
        held = [d["weights"] + d["all_gradients"] + sum(_states(d).values()) for d in devices]
        assert made.held == max(held)


def test_mixed_precision_keeps_bfloat16_copies_of_the_weights(folder):
    source = str(folder("llama", 9))
    plain, mixed = (
        make_plan(Settings(ModelSpec(source, None, 16, dtype), "adamw", batch_size=1))
        for dtype in ("float32", "bfloat16-mixed")
    )
    assert mixed.weights == plain.weights and mixed.state == plain.state
    named = meta_model(ModelSpec(source, None, 16)).module.named_parameters()
    matrices = sum(p.numel() for name, p in named if p.dim() == 2 and "embed" not in name)
    # Autocast keeps its casts until the pass ends, and so does autograd.
    assert mixed.activations > plain.activations / 2 + 2 * matrices * 0.9


def factory() -> tuple[nn.Module, object]:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    return model, lambda batch_size, sequence_length: {"input": torch.zeros(batch_size, 8)}


def test_a_factory_gives_model_and_inputs(monkeypatch):
    module = types.ModuleType("own_model")
    module.make = factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_model", module)
    spec = ModelSpec("own_model:make", None, 2, "float32")
    made = make_plan(Settings(spec, "adamw", batch_size=4))
    assert made.parameters == 8 * 32 + 32 + 32 * 8 + 8
    # Saved are the output of ReLU, which is the input of the second layer, once.
    assert made.activations == 4 * 4 * 32 + 4


def test_unknown_inputs_leave_everything_else_exact(tmp_path, monkeypatch):
    module = types.ModuleType("odd_model")
    module.make = lambda: nn.Bilinear(3, 4, 5)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_model", module)
    made = make_plan(Settings(ModelSpec("odd_model:make", None, 2), "adamw", batch_size=1))
    assert made.peak is None and made.weights == 2 * (60 + 5)
    assert any("activations are not known" in note for note in made.notes)
    assert as_dict(made)["bytes"]["peak"] is None


@pytest.mark.parametrize("method", ["galore", "adamw", "apollo", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_no_more_than_planned(settings, method, dtype):
    from torch.profiler import ProfilerActivity, profile

    options = GALORE if method in ("galore", "apollo") else {}
    name = "float32" if dtype == torch.float32 else "bfloat16"
    spec = replace(settings.model, dtype=name)
    planned = make_plan(replace(settings, model=spec, method=method, options=options)).temporary
    model = build_model(spec, "cpu").module
    optimizer = build_on(model, method, options)
    for turn in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if turn == 0:
            optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer.step()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    assert peak <= planned


def test_numbers_of_a_plan_survive_json(settings):
    values = json.loads(json.dumps(as_dict(make_plan(settings))))
    assert values["bytes"]["states"] == sum(
        values["bytes"][kind] for kind in ("first_moment", "second_moment", "basis")
    )
    assert values["baseline"]["states"] == 4 * values["parameters"]
