"""The formulas of `subspan.optim.traffic` against the bytes that were counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from worker_pool import Pool

from subspan.optim import build, methods
from subspan.optim.parts.refresh import Every
from subspan.optim.traffic import PAGE, SCALES, filled, projected, sent, sent_by_hook

GAP, STEPS = 3, 7
Counted = list[dict[str, int]]


def counted(
    mesh: DeviceMesh, method: str, shape: tuple[int, int], dim: int
) -> tuple[Counted, dict[str, int]]:
    """Bytes that this rank sent in every step, and what the formulas say of all ranks together."""

    def placed(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(dim)])

    defaults = methods()[method].defaults
    own = {"rank": 4, "update_proj_gap": GAP}
    options = {key: value for key, value in own.items() if key in defaults}
    torch.manual_seed(0)
    weight = torch.nn.Parameter(placed(torch.randn(shape)))
    optimizer = build(method, [("block.0.q.weight", weight)], nonfinite="ignore", **options)
    layout, parts = optimizer.layout_of(weight), optimizer.parts_of(weight)
    assert optimizer.sharding is not None and parts is not None
    whole = replace(layout, natural=shape, view=shape, whole=None)
    cost = sent(whole, parts, dim, mesh.size())
    assert cost.way == optimizer.sharding.place_of(weight).way
    steps = []
    for _ in range(STEPS):
        before = dict(optimizer.sharding.traffic)
        weight.grad = placed(torch.randn(shape))
        optimizer.step()
        now = optimizer.sharding.traffic
        steps.append({key: now[key] - before.get(key, 0) for key in now})
    every = parts.refresh.gap if isinstance(parts.refresh, Every) else 0
    phase = parts.refresh.phase if isinstance(parts.refresh, Every) else 0
    return steps, {
        "step": cost.step,
        "refresh": cost.refresh,
        "first": cost.first,
        "norms": cost.norms,
        "every": every,
        "phase": phase,
    }


@pytest.mark.parametrize(("shape", "dim"), [((24, 12), 0), ((12, 24), 1), ((13, 11), 0)])
def test_formulas_give_the_bytes_that_are_counted(
    pool: Pool, method: str, shape: tuple[int, int], dim: int
) -> None:
    found = pool.run(counted, method, shape, dim, ranks=2)
    formula = found[0][1]
    for step in range(STEPS):
        bytes_sent = [own[0][step] for own in found]
        total = sum(v for own in bytes_sent for k, v in own.items() if k != "sums")
        every, phase = formula["every"], formula["phase"]
        refreshes = step == 0 or (every and (step + 1 - phase) % every == 0)
        more = formula["refresh" if step else "first"] if refreshes else 0
        assert total == formula["step"] + more
        for own in bytes_sent:
            looked = 4 * bool(refreshes and formula["refresh"])  # whether the gradient is zero
            assert own.get("sums", 0) == 4 * formula["norms"] + looked


def test_the_hook_is_counted_by_its_formula() -> None:
    weight = torch.nn.Parameter(torch.ones(24, 12))
    optimizer = build("galore", [("block.0.q.weight", weight)], rank=4)
    layout, parts = optimizer.layout_of(weight), optimizer.parts_of(weight)
    assert parts is not None
    assert sent_by_hook(layout, parts) == 4 * 24 * 4
    assert sent_by_hook(layout, parts.plain_matrices) == 4 * 24 * 12


def test_projected_costs_follow_from_the_shapes() -> None:
    small = replace(SCALES[0], matrices=(((64, 32), 3),), ranks=2, bandwidth=1e3, rank=8)
    muon = projected(small, "muon")
    # Three matrices on two ranks are two rounds; half of a matrix travels, three times.
    assert muon["step"] == pytest.approx(2 * 3 * 64 * 32 / 2 * 4 / 1e3)
    assert muon["bytes"] == pytest.approx(3 * 3 * 64 * 32 / 2 * 4 / 2)
    galore = projected(small, "galore")
    assert galore["step"] == 0 and galore["kept"] == 3 * 32 * 8 * 4
    assert galore["refresh"] == pytest.approx(2 * (64 * 32 / 2 + 32 * 8) * 4 / 1e3)
    assert galore["mean"] == pytest.approx(galore["refresh"] / 200)


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / PAGE
    assert filled(page.read_text()) == page.read_text()
