"""Low-bit recordings: 8-bit moments, int4 bases, int8 weights, and Q-GaLore's lazy refresh."""

from __future__ import annotations

import pytest
import torch
from recording import STEPS, follow, load, recorded_bases

import subspan.optim as optim
from subspan.layers import QuantisedWeight
from subspan.linalg.affine import dequantise_affine, quantise_affine
from subspan.optim.parts.refresh import Every
from subspan.subspaces.finders import Replay

MATRICES = ("wide", "tall", "square")
INT8 = {"first_moment": "int8", "second_moment": "int8"}


def test_galore_with_int8_states_equals_the_official_8_bit_optimizer():
    recording, _ = load("galore_adamw8bit_states8")
    bases = recorded_bases(recording)

    def build(weights):
        return optim.GaLore(
            list(weights.items()),
            lr=1e-2,
            rank=8,
            update_proj_gap=10,
            scale=0.25,
            convention="bitsandbytes",
            storage=INT8,
            finder=Replay(bases),
        )

    # A moment in the middle between two codes may take the other one: 1e-6 of the weights then.
    follow(build, recording, tolerance=1e-5)


def test_coap_with_int8_states_equals_the_official_8_bit_optimizer():
    recording, _ = load("coap_adamw8bit")
    storage = dict.fromkeys(INT8, "int8-signed@4096")

    def build(weights):
        return optim.build(
            "coap",
            list(weights.items()),
            lr=1e-2,
            rank=8,
            update_proj_gap=10,
            reproject_factor=2,
            scale=0.25,
            storage=storage,
            finder=Replay(recorded_bases(recording)),
        )

    follow(build, recording, tolerance=1e-5)


def test_flora_with_int8_momentum_equals_the_official_quantised_one():
    recording, _ = load("flora_quantized")

    # The official code quantises second moments only where they are not factored.
    storage = {"first_moment": "int8-signed@4096"}
    whole = storage | {"second_moment": "int8-signed@4096"}

    def build(weights):
        named = list(weights.items())
        groups = [{"params": named[:1], "storage": whole}, {"params": named[1:]}]
        options = {"rank": 8, "kappa": 10, "beta1": 0.9, "scale_parameter": False}
        return optim.Flora(groups, lr=1e-2, storage=storage, **options)

    follow(build, recording, tolerance=1e-6, until=20)
    # After step 20 one momentum of `wide` lies in the middle between two codes.
    follow(build, recording, tolerance=1e-4, outliers=0.03)


@pytest.mark.parametrize("name", ["nearest", "stochastic", "floatweights"])
def test_q_galore_equals_the_official_simulation(name):
    recording, spec = load(f"qgalore_sim_{name}")
    given = load("inputs")[0]
    order = ("bias", *MATRICES)
    weights = {p: torch.nn.Parameter(given[f"init/{p}"].clone()) for p in order}
    optimizer = optim.build(
        "q_galore",
        list(weights.items()),
        lr=1e-2,
        rank=8,
        update_proj_gap=10,
        betas=(0.9, 0.95),
        # The recording holds bases as they are read back from int4, at the steps that its signed
        # cosine chose.
        storage=INT8,
        refresh=Every(10),
        finder=Replay(recorded_bases(recording)),
    )
    group = spec.get("weight_group_size", 128)
    compared = 0
    for step in range(1, STEPS + 1):
        for parameter, weight in weights.items():
            weight.grad = given[f"grad/{step:02d}/{parameter}"].clone()
        optimizer.step()
        for parameter in MATRICES if name != "floatweights" else ():
            weight = weights[parameter].data
            uniforms = recording.get(f"uniform/{parameter}/step{step:02d}")
            codes, scale, zero = quantise_affine(weight, 8, group, uniforms=uniforms)
            weight.copy_(dequantise_affine(codes, scale, zero, group).view_as(weight))
        for parameter, weight in weights.items():
            expected = recording.get(f"weight/{parameter}/step{step:02d}")
            if expected is not None:
                difference = (weight.detach() - expected).abs()
                # Where rounding falls on the other side, by one step of a weight's group.
                quantum = 0.0 if name == "floatweights" or parameter == "bias" else 2e-3
                outliers = (difference > 2e-5).float().mean()
                assert difference.max() <= max(2e-5, quantum), (parameter, step)
                assert outliers <= 0.01, (parameter, step)
                compared += 1
    assert compared == 24


@pytest.mark.parametrize("name", ["int4", "float"])
def test_lazy_refresh_and_projection_equal_the_official_projector(name):
    recording, spec = load(f"qgalore_projector_{name}")
    given = load("inputs")[0]
    floats = {
        p: {
            int(key[-2:]): value
            for key, value in recording.items()
            if key.startswith(f"basis_float/{p}/")
        }
        for p in MATRICES
    }
    weights = {p: torch.nn.Parameter(given[f"init/{p}"].clone()) for p in MATRICES}
    optimizer = optim.build(
        "q_galore",
        list(weights.items()),
        lr=1e-2,
        rank=8,
        update_proj_gap=2,
        queue_size=2,
        signed_cosine=True,
        storage={"basis": "int4@128"} if name == "int4" else "parameter",
        finder=Replay(floats),
    )
    log = {p: [] for p in MATRICES}
    for step in range(1, STEPS + 1):
        for parameter, weight in weights.items():
            weight.grad = given[f"grad/{step:02d}/{parameter}"].clone()
        optimizer.step()
        for parameter, weight in weights.items():
            state = optimizer.state[weight]
            if state["refreshed"] == step:
                log[parameter].append((step, 2 * state["gap_growth"], state["similarities"]))
                codes = recording.get(f"basis_q/{parameter}/step{step:02d}")
                if codes is not None and name == "int4":
                    assert _unpacked(state["basis"], codes.numel(), floats[parameter][step], codes)
    for parameter in MATRICES:
        expected = spec["refresh_log"][parameter]
        assert [(s, g) for s, g, _ in log[parameter]] == [
            (entry["step"], entry["gap_after"]) for entry in expected
        ]
        for (_, _, queue), entry in zip(log[parameter], expected, strict=True):
            assert queue == pytest.approx(entry["queue"], abs=2e-5)


def _unpacked(packed, count, basis, recorded):
    """Whether packed int4 codes are the recorded ones, which lie in the official orientation."""
    from subspan.linalg.quantise import unpack_nibbles

    codes = unpack_nibbles(packed, count)
    if recorded.numel() != count:
        return False
    # The official right basis is stored transposed, so its groups hold other entries.
    return (
        torch.equal(codes, recorded.reshape(-1).to(torch.uint8)) or basis.shape[0] < basis.shape[1]
    )


def test_int8_weights_follow_the_requantised_float_weights():
    """A quantised parameter is its float weight, rounded after every step."""
    given = load("inputs")[0]
    held = QuantisedWeight.from_float(given["init/wide"], group=128)
    quantised = torch.nn.Parameter(held)
    plain = torch.nn.Parameter(held.dequantise())
    options = {"lr": 1e-2, "rank": 8, "update_proj_gap": 10, "stochastic_rounding": False}
    first = optim.build("q_galore", [("wide", quantised)], **options)
    second = optim.build("q_galore", [("wide", plain)], **options)
    for step in range(1, 13):
        for weight, optimizer in ((quantised, first), (plain, second)):
            weight.grad = given[f"grad/{step:02d}/wide"].clone()
            optimizer.step()
        codes, scale, zero = quantise_affine(plain.data, 8, 128)
        plain.data.copy_(dequantise_affine(codes, scale, zero, 128).view_as(plain))
        assert torch.equal(quantised.dequantise(), plain.detach())
