"""The published counts of the five LLaMA sizes, to the byte, and the table made of them."""

from __future__ import annotations

import pytest

from subspan.plan import ModelSpec, Settings, make_plan
from subspan.plan.model import meta_model
from subspan.plan.parts import parts_of

# size: rank, parameters, weight bytes, Adam state bytes, GaLore state elements and bytes.
VECTORS = {
    "60m": (128, 58_073_600, 116_147_200, 232_294_400, 81_871_872, 163_743_744),
    "130m": (256, 134_105_856, 268_211_712, 536_423_424, 171_480_576, 342_961_152),
    "350m": (256, 367_969_280, 735_938_560, 1_471_877_120, 326_404_096, 652_808_192),
    "1b": (512, 1_339_082_752, 2_678_165_504, 5_356_331_008, 1_042_460_672, 2_084_921_344),
    "7b": (1024, 6_738_415_616, 13_476_831_232, 26_953_662_464, 4_702_347_264, 9_404_694_528),
}
# size: percent less than Adam: standard, projector not counted, blocks' matrices alone, in 8 bits
# with the projector at one byte, and at two.
TABLE = {
    "60m": (29.5, 32.7, 67.7, 64.8, 63.2),
    "130m": (36.1, 42.2, 56.9, 68.0, 65.0),
    "350m": (55.65, 61.6, 67.7, 77.8, 74.8),
    "1b": (61.1, 67.7, 67.7, 80.5, 77.25),
    "7b": (65.1, 72.1, 67.7, 82.55, 79.1),
}


def plan(size: str, method: str, **options: object) -> dict[str, int]:
    settings = Settings(ModelSpec(f"llama-{size}"), method, options, batch_size=1)
    made = make_plan(settings)
    return {"parameters": made.parameters, "weights": made.weights, **made.states}


@pytest.mark.parametrize("size", VECTORS)
def test_plan_equals_the_published_counts_to_the_byte(size):
    rank, parameters, weights, adam, elements, galore = VECTORS[size]
    counted = plan(size, "adamw")
    assert counted.pop("parameters") == parameters
    assert counted.pop("weights") == weights
    assert sum(counted.values()) == adam
    own = plan(size, "galore", rank=rank)
    states = own["first_moment"] + own["second_moment"] + own["basis"]
    assert states == galore == 2 * elements


@pytest.mark.parametrize("size", TABLE)
def test_reductions_equal_the_published_table(size):
    rank, _, _, adam, _, galore = VECTORS[size]
    module = meta_model(ModelSpec(f"llama-{size}")).module
    parts = parts_of(module, "galore", {"rank": rank})
    basis = parts.states["basis"]
    matrices = [h for h in parts.parameters if ".layers." in h.name and len(h.shape) == 2]
    inside = sum(sum(held.states.values()) for held in matrices)
    found = (
        galore / adam,
        (galore - basis) / adam,
        inside / sum(4 * held.entries for held in matrices),
        galore / 2 / adam,
        ((galore - basis) / 2 + basis) / adam,
    )
    for share, published in zip(found, TABLE[size], strict=True):
        assert 100 * (1 - share) == pytest.approx(published, abs=0.051)


@pytest.mark.parametrize(("size", "published"), [("1b", 64.7), ("7b", 66.5)])
def test_projecting_the_head_too_gives_the_published_reduction(size, published):
    names = [r"(self_attn|mlp)\..*weight$", "^lm_head"]
    own = plan(size, "galore", rank=VECTORS[size][0], project=names)
    states = own["first_moment"] + own["second_moment"] + own["basis"]
    assert 100 * (1 - states / VECTORS[size][3]) == pytest.approx(published, abs=0.051)


def test_q_galore_plans_seven_billion_parameters_in_sixteen_gibibytes():
    model = ModelSpec("llama-7b", int8_weights=True)
    settings = Settings(
        model,
        "q_galore",
        {"rank": 1024},
        batch_size=1,
        update_in_backward=True,
        clipping="each",
    )
    made = make_plan(settings)
    matrices, others = 6_476_005_376, 262_410_240
    assert made.weights == matrices + matrices // 256 * 5 + 2 * others
    assert made.gradients == 32000 * 4096 * 2
    assert made.needed < 16 * 2**30


@pytest.mark.parametrize("spelling", ["7b", "LLaMA-7B", "llama_7b", "llama7b", "llama-7b"])
def test_spellings_of_a_size_name_the_same_model(spelling):
    assert meta_model(ModelSpec(spelling)).label == "llama-7b"
