"""COAP on matrices against the trajectories of its released code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from recording import STEPS, Tensors, follow, load, recorded_bases

import subspan.optim as optim
from subspan.subspaces.bases import Dense, Subspace
from subspan.subspaces.finder import Finder, Sight
from subspan.subspaces.finders import Replay
from subspan.subspaces.finders_coap import CoapNudge
from subspan.subspaces.geometry import align_signs

COMMON = {"rank": 8, "update_proj_gap": 10, "reproject_factor": 2, "lr": 1e-2, "scale": 0.25}
ADAFACTOR = {"inner": "adafactor", "beta1": 0.9, **COMMON}
CASES: dict[str, dict[str, Any]] = {
    "coap_adamw": COMMON,
    "coap_adamw_restore": {"restore_state": True, **COMMON},
    "coap_adafactor": ADAFACTOR,
    "coap_adafactor_restore": {"restore_state": True, **ADAFACTOR},
}


def run(
    name: str, recording: Tensors, *, tolerance: float, until: int = STEPS, **options: Any
) -> torch.optim.Optimizer:
    return follow(
        lambda weights: optim.build("coap", list(weights.items()), **CASES[name], **options),
        recording,
        tolerance=tolerance,
        until=until,
    )


@pytest.mark.parametrize("name", CASES)
def test_coap_equals_the_official_trajectory_with_recorded_bases(name: str) -> None:
    recording, _ = load(name)
    run(name, recording, tolerance=2e-6, finder=Replay(recorded_bases(recording)))


@pytest.mark.parametrize("name", CASES)
def test_coap_equals_the_official_trajectory_until_the_recomputation(name: str) -> None:
    """The first basis and the nudge at step 11 are its own; signs do not matter until step 20."""
    recording, _ = load(name)
    run(name, recording, tolerance=2e-6, until=20, sketch_seed=3407)


def test_restored_first_moments_do_not_depend_on_signs() -> None:
    recording, _ = load("coap_adafactor_restore")
    run("coap_adafactor_restore", recording, tolerance=2e-6, sketch_seed=3407)


@dataclass(frozen=True)
class RecordedSigns(Finder):
    """Its own bases, with the signs of the recorded ones."""

    own: CoapNudge = field(default_factory=CoapNudge)
    bases: Mapping[str, Mapping[int, torch.Tensor]] = field(default_factory=dict)
    reads_momentum = True
    orthonormal = False

    def find(self, sight: Sight) -> Subspace:
        found = self.own.find(sight)
        recorded = Replay(self.bases).find(sight)
        assert isinstance(found, Dense) and isinstance(recorded, Dense)
        return Dense(found.side, align_signs(found.basis, recorded.basis), orthonormal=False)


# The turned root of a second moment may nearly cancel and is squared: then an entry of a basis that
# is off by a unit in the last place shows.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("coap_adamw", 2e-6), ("coap_adamw_restore", 1e-4), ("coap_adafactor", 2e-6)],
)
def test_coap_equals_the_official_trajectory_with_bases_of_its_own(
    name: str, tolerance: float
) -> None:
    recording, _ = load(name)
    own = CoapNudge(recompute_every=20, sketch_seed=3407)
    finder = RecordedSigns(own, recorded_bases(recording))
    optimizer = run(name, recording, tolerance=tolerance, finder=finder)
    for parameter in optimizer.param_groups[0]["params"][1:]:
        state = optimizer.state[parameter]
        expected = recorded_bases(recording)[optimizer.layout_of(parameter).name][31]
        expected = expected if expected.shape == state["basis"].shape else expected.mT
        torch.testing.assert_close(state["basis"], expected, rtol=0, atol=2e-6)
