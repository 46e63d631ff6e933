"""SubTrack++ against the trajectories of its released code, and the published formulas of it,
GrassWalk, GrassJump and SARA against transcriptions in float64.

The transcriptions are one reading: eps is added after Adam's bias corrections, the residual is
scaled, too, and its growth is limited as it is applied. All three are options of the recipes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from recording import PARAMETERS, STEPS, Tensors, follow, load, recorded_bases

import subspan.optim as optim
from subspan import linalg
from subspan.subspaces.bases import Subspace
from subspan.subspaces.finder import Sight
from subspan.subspaces.finders import Replay
from subspan.subspaces.finders_grassmann import GrassmannWalk
from subspan.subspaces.finders_sampled import ImportanceSampledSVD

MATRICES = ("wide", "tall", "square")
COMMON = {"rank": 8, "update_proj_gap": 10, "lr": 1e-2}
BIAS_CORRECTED = {"convention": "torch", "eps": 1e-6, **COMMON}
READING = {"scale_residual": True, "corrected_limit": True, **BIAS_CORRECTED}

TRACKING_ONLY = {"projection_aware": False, "recovery_scaling": False}
# Options, tolerance, last step compared. The released transport leaves second moments that are
# differences of nearly equal numbers. At a step size of 10 the basis turns by many radians, and
# rounding errors grow with every refresh.
RELEASED: dict[str, tuple[dict[str, Any], float, int]] = {
    "subtrackpp_tracking_only_eta0.1": ({"step_size": 0.1, **TRACKING_ONLY}, 4e-6, STEPS),
    "subtrackpp_aware_only_eta0.1": ({"step_size": 0.1, "recovery_scaling": False}, 1e-4, STEPS),
    "subtrackpp_recovery_only_eta0.1": (
        {"step_size": 0.1, "projection_aware": False},
        4e-6,
        STEPS,
    ),
    "subtrackpp_recovery_nolimiter_eta0.1": (
        {"step_size": 0.1, "projection_aware": False, "growth_limit": None},
        4e-6,
        STEPS,
    ),
    "subtrackpp_full_eta0.1": ({"step_size": 0.1}, 1e-4, STEPS),
    "subtrackpp_full_eta10": ({"step_size": 10.0}, 1e-4, 20),
}


def recorded_draws(recording: Tensors) -> dict[str, dict[int, torch.Tensor]]:
    """{parameter: {step: draw}} from names such as draw/wide/step11."""
    draws: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in recording.items():
        if key.startswith("draw/"):
            _, parameter, step = key.split("/")
            draws.setdefault(parameter, {})[int(step.removeprefix("step"))] = value
    return draws


def named(weights: dict[str, torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return list(weights.items())


@pytest.mark.parametrize("name", RELEASED)
def test_subtrack_as_released_equals_the_official_trajectory(name: str) -> None:
    options, tolerance, until = RELEASED[name]
    follow(
        lambda weights: optim.build(
            "subtrack_pp", named(weights), as_released=True, **COMMON, **options
        ),
        load(name)[0],
        tolerance=tolerance,
        parameters=PARAMETERS,
        until=until,
    )


def compare_bases(
    optimizer: torch.optim.Optimizer, recording: dict[str, torch.Tensor], tolerance: float
) -> None:
    """The subspaces at the end equal the recorded ones; bases only up to signs and rotation."""
    bases = recorded_bases(recording)
    for parameter, name in zip(optimizer.param_groups[0]["params"], MATRICES, strict=True):
        mine = optimizer.state[parameter]["basis"]
        theirs = bases[name][31]
        torch.testing.assert_close(mine @ mine.mT, theirs @ theirs.mT, rtol=0, atol=tolerance)


def test_subtrack_equals_the_formulas_of_its_paper() -> None:
    recording, _ = load("ref_subtrackpp_paper_eta0.1")
    optimizer = follow(
        lambda weights: optim.build("subtrack_pp", named(weights), step_size=0.1, **READING),
        recording,
        tolerance=1e-5,
        parameters=MATRICES,
    )
    compare_bases(optimizer, recording, 1e-5)


@dataclass(frozen=True)
class RecordedWalk(GrassmannWalk):
    """Walks along the recorded Gaussian matrices, from the recorded first basis.

    Relative to a basis with other signs the same matrices are other directions.
    """

    recording: Tensors = field(default_factory=dict)

    def find(self, sight: Sight) -> Subspace:
        if sight.previous is None:
            return Replay(recorded_bases(self.recording)).find(sight)
        return super().find(sight)

    def direction(self, sight: Sight) -> torch.Tensor:
        draws = recorded_draws(self.recording)
        return sight.stacked([draws[layout.name][sight.step] for layout in sight.layouts])


def test_grasswalk_equals_its_formulas_with_the_recorded_draws() -> None:
    recording, _ = load("ref_grasswalk_eta0.1")
    walk = RecordedWalk(0.1, normalise=False, recording=recording)
    optimizer = follow(
        lambda weights: optim.build("grasswalk", named(weights), finder=walk, **READING),
        recording,
        tolerance=1e-5,
        parameters=MATRICES,
    )
    compare_bases(optimizer, recording, 1e-5)


def test_grassjump_equals_its_formulas_with_the_recorded_bases() -> None:
    recording, _ = load("ref_grassjump")
    follow(
        lambda weights: optim.build(
            "grassjump", named(weights), finder=Replay(recorded_bases(recording)), **READING
        ),
        recording,
        tolerance=1e-5,
        parameters=MATRICES,
    )


def test_grassjumps_bases_are_those_of_the_recorded_draws() -> None:
    recording, _ = load("ref_grassjump")
    bases, draws = recorded_bases(recording), recorded_draws(recording)
    for name in MATRICES:
        for step, draw in draws[name].items():
            found = linalg.householder_basis(draw)
            torch.testing.assert_close(found, bases[name][step], rtol=0, atol=1e-5)


@dataclass(frozen=True)
class RecordedSample(ImportanceSampledSVD):
    """Takes the recorded ones of the singular vectors."""

    draws: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)

    def chosen(self, values: torch.Tensor, sight: Sight) -> torch.Tensor:
        return sight.stacked(
            [self.draws[layout.name][sight.step].long() for layout in sight.layouts]
        )


def test_sara_equals_its_formulas_with_the_recorded_bases() -> None:
    recording, _ = load("ref_sara_galore_adam")
    follow(
        lambda weights: optim.build(
            "sara", named(weights), finder=Replay(recorded_bases(recording)), **BIAS_CORRECTED
        ),
        recording,
        tolerance=1e-5,
        parameters=MATRICES,
    )


def test_saras_bases_are_those_of_the_recorded_indices() -> None:
    recording, _ = load("ref_sara_galore_adam")
    finder = RecordedSample(recorded_draws(recording))
    # Up to the second refresh the signs of singular vectors do not matter.
    optimizer = follow(
        lambda weights: optim.build("sara", named(weights), finder=finder, **BIAS_CORRECTED),
        recording,
        tolerance=1e-5,
        parameters=MATRICES,
        until=10,
    )
    bases = recorded_bases(recording)
    for parameter, name in zip(optimizer.param_groups[0]["params"], MATRICES, strict=True):
        mine, theirs = optimizer.state[parameter]["basis"], bases[name][1]
        torch.testing.assert_close((mine * theirs).sum(0).abs(), torch.ones(8), rtol=0, atol=1e-5)


def test_galore2_with_recorded_bases_equals_the_official_galore() -> None:
    recording, _ = load("galore_adamw_std")
    bases = Replay(recorded_bases(recording))
    follow(
        lambda weights: optim.build("galore2", named(weights), finder=bases, scale=0.25, **COMMON),
        recording,
        tolerance=2e-6,
    )
