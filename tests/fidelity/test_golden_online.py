"""Online Subspace Descent against the recorded trajectories of the official implementation.

The first basis comes from an SVD, whose signs do not matter here; bases that a random generator
drew are replayed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recording import follow, load, recorded_bases

import subspan.optim as optim
from subspan.subspaces.finders import Replay

# The official projection's learning rate is the reciprocal of the recordings' update_proj_gap.
SHARED = {"rank": 8, "lr": 1e-2, "projection_lr": 0.1, "update_gap": 10}
CASES: dict[str, dict[str, Any]] = {
    "osd_adamw_p_adamw": {"projection_optimizer": "adamw"},
    "osd_adamw_p_sgd": {"projection_optimizer": "sgd"},
    "osd_adamw_p_lion": {"projection_optimizer": "lion"},
    "osd_adamw_p_adafactor": {"projection_optimizer": "adafactor"},
    "osd_adamw_random": {"projection_optimizer": "random"},
    "osd_lion_p_adamw": {"inner": "lion", "lr": 1e-3},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_trajectory(name: str) -> None:
    recording, _ = load(name)
    options = SHARED | CASES[name]
    if name == "osd_adamw_random":
        options["finder"] = Replay(recorded_bases(recording))

    def build(weights: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return optim.build("online_subspace_descent", list(weights.items()), **options)

    follow(build, recording, tolerance=1e-4)
