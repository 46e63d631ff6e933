"""Recordings of convolution kernels: COAP's Tucker form."""

from __future__ import annotations

import pytest
from recording import follow, load, recorded_bases

import subspan.optim as optim
from subspan.subspaces.finders import Replay


@pytest.mark.parametrize("bases", ["recorded", "own"])
@pytest.mark.parametrize("restore", [False, True])
def test_coap_on_a_convolution_equals_the_official_trajectory(restore, bases):
    recording, _ = load("coap_adamw_conv" + "_restore" * restore)

    def build(weights):
        finder = Replay(recorded_bases(recording)) if bases == "recorded" else None
        return optim.build(
            "coap",
            list(weights.items()),
            lr=1e-2,
            update_proj_gap=10,
            reproject_factor=2,
            scale=0.25,
            rank_ratio_cnn=4.0,
            restore_state=restore,
            conv_finder=finder,
        )

    # Signs of recomputed factors are aligned here and LAPACK's there, which shows from step 21 on.
    # The first step divides core entries near zero by their own size.
    until = 40 if bases == "recorded" else 20
    options = {"parameters": ("conv",), "inputs": "inputs_conv", "until": until}
    follow(build, recording, tolerance=2e-6 if bases == "recorded" else 1e-4, **options)
