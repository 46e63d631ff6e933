"""DCT-AdamW and Trion against the trajectories of their released code, and against the published
formulas in float64.

The released rotation of the moments, `M R` written over M while it is read, left zeros on the
machine that recorded: moments start again at every choice of columns there. Where that shows, the
recordings are compared with moments that do; that they follow their columns is shown against the
formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from recording import PARAMETERS, Tensors, follow, load, recorded_bases
from torch import Tensor

import subspan.optim as optim
from subspan import linalg
from subspan.optim.parts.transport import Forget
from subspan.subspaces.finders import Replay
from subspan.subspaces.finders_fixed import TopColumns

SHARED: dict[str, Any] = {"rank": 8}
PLAIN = {"error_feedback": False, "rotate": False}
CASES: dict[str, dict[str, Any]] = {
    "dct_adamw_plain": PLAIN,
    "dct_adamw_gap": PLAIN | {"update_proj_gap": 10},
    "dct_adamw_ef_rotate": {},
    "dct_adamw_ef_rotate_gap": {"update_proj_gap": 10},
    "dct_adamw_l2_ef_rotate": {"norm": 2},
    "dct_adamw_makhoul_ef_rotate": {"matrix": "dct2"},
    "dct_adamw_randqr_ef_rotate": {"matrix": "random"},
    "dct_adamw_ef8_rotate": {},
    "dct_adamw_ef4_rotate": {},
}
# A code of the quantised error changes with the last bit of a cosine: these use the recorded ones.
RECORDED_MATRIX = ("dct_adamw_randqr_ef_rotate", "dct_adamw_ef8_rotate", "dct_adamw_ef4_rotate")
QUANTISED = {"dct_adamw_ef8_rotate": "rows8-released", "dct_adamw_ef4_rotate": "rows4-released"}


@dataclass(frozen=True)
class Given(TopColumns):
    """Columns of a given matrix, handed over as rows."""

    rows: Tensor = field(default_factory=lambda: torch.eye(1), repr=False)

    def vectors(self, *_: Any) -> Tensor:
        return self.rows


def build(
    name: str, parameter: str, recording: Tensors, weight: Any, *, replayed: bool = True
) -> Any:
    options = SHARED | CASES[name]
    columns = TopColumns(options.get("matrix", "dct3"), options.get("norm", 1))
    if name in RECORDED_MATRIX and parameter != "bias":
        # The recorded matrix is no transform that the finder knows a fast form of.
        columns = Given("random", rows=recording[f"basis_full/{parameter}"].mT.contiguous())
    options["finder"] = columns
    # Without rotation the order of the slots, topk's own, matters; a code of the quantised error
    # that falls on the other side tips a near tie.
    if replayed and (not options.get("rotate", True) or name in QUANTISED):
        options["finder"] = Replay(recorded_bases(recording), like=columns)
    recipe = optim.lookup("dct_adamw")
    made = recipe.compose({**recipe.defaults, **options})
    if name in QUANTISED:
        made = replace(made, transport=Forget())
    storage = {"error": QUANTISED.get(name, "parameter")}
    return optim.Composed([(parameter, weight)], composition=made, lr=1e-2, storage=storage)


@pytest.mark.parametrize("name", CASES)
def test_dct_adamw_equals_the_official_trajectory(name: str) -> None:
    recording, _ = load(name)
    for parameter in PARAMETERS:
        follow(
            lambda weights, p=parameter: build(name, p, recording, weights[p]),
            recording,
            tolerance=1e-5,
            parameters=(parameter,),
        )


@pytest.mark.parametrize("name", [n for n in CASES if n not in QUANTISED])
def test_chosen_columns_are_the_official_ones(name: str) -> None:
    recording, _ = load(name)
    given, _ = load("inputs")
    chosen = recorded_bases(recording)
    for parameter in PARAMETERS[1:]:
        weight = torch.nn.Parameter(given[f"init/{parameter}"].clone())
        optimizer = build(name, parameter, recording, weight, replayed=False)
        for step in range(1, 41):
            weight.grad = given[f"grad/{step:02d}/{parameter}"].clone()
            optimizer.step()
            if step in chosen[parameter]:
                ours = optimizer.state[weight]["index"].tolist()
                assert sorted(ours) == sorted(chosen[parameter][step].tolist())


@pytest.mark.parametrize("kind", ["kj", "dion"])
def test_trion_equals_the_official_trajectory(kind: str) -> None:
    """In bfloat16, whose products differ between machines."""
    recording, _ = load(f"trion_{kind}")
    follow(
        lambda weights: optim.build(
            "trion",
            list(weights.items()),
            lr=1e-2,
            rank=8,
            scaling_type=kind,
            as_released=True,
        ),
        recording,
        tolerance=2e-3,
    )


def cosines(n: int, kind: str) -> Tensor:
    """D[i, j] = s_i cos(pi i (2j + 1) / 2n), entry by entry; the columns of D or of its transpose
    are the basis."""
    rows = [
        [
            math.sqrt((1 if i == 0 else 2) / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n))
            for j in range(n)
        ]
        for i in range(n)
    ]
    matrix = torch.tensor(rows, dtype=torch.float64)
    return matrix if kind == "dct3" else matrix.T


def slowly_changing(shape: tuple[int, int], steps: int, seed: int) -> Tensor:
    """Gradients whose strongest cosines partly stay from step to step."""
    draw = torch.Generator().manual_seed(seed)
    lasting = torch.randn(shape, generator=draw, dtype=torch.float64)
    fresh = torch.randn(steps, *shape, generator=draw, dtype=torch.float64)
    return 1.5 * lasting + fresh


@pytest.mark.parametrize("kind", ["dct2", "dct3"])
@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize("gap", [1, 3])
def test_dct_adamw_equals_the_published_formulas_in_float64(
    kind: str, shape: tuple[int, int], gap: int
) -> None:
    gradients = slowly_changing(shape, 14, 5)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = optim.build(
        "dct_adamw", [weight], lr=0.01, weight_decay=0.1, rank=8, update_proj_gap=gap, matrix=kind
    )
    tall = shape[0] > shape[1]
    full, rank = cosines(12, kind), 8
    expected = torch.zeros(max(shape), 12, dtype=torch.float64)
    error = torch.zeros_like(expected)
    first, second = torch.zeros(2, 18, rank, dtype=torch.float64)
    basis, stayed = None, 0
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient.clone()
        optimizer.step()
        a = (gradient if tall else gradient.T) + error
        if basis is None or step % gap == 0:
            chosen = (a @ full).abs().sum(0).sort(descending=True).indices[:rank]
            turn = torch.eye(rank) if basis is None else basis.T @ full[:, chosen]
            stayed += int(turn.abs().sum().round()) if basis is not None else 0
            basis = full[:, chosen]
            first, second = first @ turn.double(), (second @ turn.double()).abs()
        inside = a @ basis
        error = a - inside @ basis.T
        first = 0.9 * first + 0.1 * inside
        second = 0.999 * second + 0.001 * inside**2
        mean, root = first / (1 - 0.9**step), (second / (1 - 0.999**step)).sqrt()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (mean / (root + 1e-8)) @ basis.T
    assert stayed > 5  # the moments of columns that stay were put to the test
    ours = weight.detach() if tall else weight.detach().T
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 18), (18, 12), (12, 12)])
def test_trion_equals_the_published_formulas_in_float64(shape: tuple[int, int]) -> None:
    gradients = slowly_changing(shape, 8, 6)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = optim.build("trion", [weight], lr=0.01, rank=5, momentum=0.9, scaling_type="kimi")
    tall = shape[0] >= shape[1]
    full = cosines(12, "dct3")
    expected = torch.zeros(max(shape), 12, dtype=torch.float64)
    momentum = torch.zeros_like(expected)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = momentum + (gradient if tall else gradient.T)
        chosen = (momentum @ full).abs().sum(0).sort(descending=True).indices[:5]
        inside = momentum @ full[:, chosen]
        momentum = momentum - (1 - 0.9) * inside @ full[:, chosen].T
        turned = linalg.newton_schulz(inside)
        expected -= 0.01 * 0.2 * math.sqrt(max(shape)) * turned @ full[:, chosen].T
    ours = weight.detach() if tall else weight.detach().T
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 15), (15, 9)])
def test_full_rank_trion_is_muon_without_nesterov(shape: tuple[int, int]) -> None:
    """Sums and averages of gradients differ by a factor, which Newton-Schulz does not see."""
    moved = []
    for method, options in (("trion", {}), ("muon", {"nesterov": False, "weight_decay": 0.0})):
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = optim.build(method, [weight], lr=0.01, **options)
        for gradient in slowly_changing(shape, 6, 7):
            weight.grad = gradient.clone()
            optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 15), (15, 9)])
def test_full_rank_dct_adamw_is_adamw_on_the_transformed_weights(shape: tuple[int, int]) -> None:
    full, tall = cosines(9, "dct3"), shape[0] > shape[1]
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    turned = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    ours = optim.build("dct_adamw", [weight], lr=0.01, rank=9, weight_decay=0.1)
    theirs = torch.optim.AdamW([turned], lr=0.01, weight_decay=0.1)
    for gradient in slowly_changing(shape, 6, 8):
        weight.grad = gradient.clone()
        turned.grad = gradient @ full if tall else full.T @ gradient
        ours.step()
        theirs.step()
    back = turned.detach() @ full.T if tall else full @ turned.detach()
    torch.testing.assert_close(weight.detach(), back, rtol=1e-9, atol=1e-10)
