"""Our optimizers through the public interface, with the settings of the peers beside them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.contenders import LEARNING_RATE, SCALE, Builder, Contender
from benchmarks.official_code import gradients, with_gradients
from benchmarks.shapes import Parameters

_PACKAGE = "subspan"
_INT8_MOMENTS = {"first_moment": "int8", "second_moment": "int8"}
_COAP_MOMENTS = {"first_moment": "int8-signed", "second_moment": "int8-signed"}


def _build(method: str, p: Parameters, *, named: bool = False, **options: Any) -> Optimizer:
    import subspan.optim

    plain: list[Any] = p.named_plain() if named else p.plain
    projected: list[Any] = p.named_projected() if named else p.projected
    groups: list[dict[str, Any]] = [{"params": plain, "project": False}, {"params": projected}]
    return subspan.optim.build(method, groups, lr=LEARNING_RATE, **options)


def _ours(
    method: str, *, rank: str | None = "rank", gap: str | None = "update_proj_gap", **options: Any
) -> Builder:
    """`rank` and `gap` name the method's own hyper-parameters for these, None where it has none."""

    def build(p: Parameters, chosen_rank: int, chosen_gap: int) -> Optimizer:
        named = {rank: chosen_rank, gap: chosen_gap}
        given = {name: value for name, value in named.items() if name is not None}
        return _build(method, p, **{**given, **options})

    return build


def _plainly(method: str, **options: Any) -> Builder:
    """A method with neither rank nor gap."""
    return _ours(method, rank=None, gap=None, **options)


def _badam(p: Parameters, rank: int, gap: int) -> Optimizer:
    """One block for each layer, what is not projected always active, as in the official row."""
    restore = gradients(p)  # resting parameters lose theirs
    return with_gradients(_build("badam", p, named=True, switch_block_every=gap), restore)


def _q_galore_int8(p: Parameters, rank: int, gap: int) -> Optimizer:
    """Weights in 8 bits with stochastic rounding."""
    from subspan.layers import QuantisedWeight

    held = [nn.Parameter(QuantisedWeight.from_float(weight.detach())) for weight in p.projected]
    for weight, given in zip(held, p.projected, strict=True):
        weight.grad = given.grad
    return _ours("q_galore", scale=SCALE)(Parameters(held, p.plain), rank, gap)


def _earlier() -> list[Contender]:
    return [
        Contender("adamw", "AdamW", _PACKAGE, _plainly("adamw"), None),
        Contender("sgd", "SGD", _PACKAGE, _plainly("sgd"), None),
        Contender("galore", "GaLore", _PACKAGE, _ours("galore", scale=SCALE)),
        Contender("fira", "Fira", _PACKAGE, _ours("fira", alpha=SCALE)),
        Contender("apollo", "APOLLO", _PACKAGE, _ours("apollo")),
        # The authors' package keeps its random basis; ours draws it again unless told otherwise.
        Contender("apollo", "APOLLO stored basis", _PACKAGE, _ours("apollo", store_basis=True)),
        Contender("apollo_mini", "APOLLO-Mini", _PACKAGE, _ours("apollo_mini", rank=None)),
    ]


def _low_bit() -> list[Contender]:
    galore_8bit = _ours("galore", scale=SCALE, storage=_INT8_MOMENTS, convention="bitsandbytes")
    fp32_weights = _ours("q_galore", scale=SCALE)
    q_galore = ("q_galore", "Q-GaLore fp32 weights", _PACKAGE, fp32_weights)
    return [
        Contender("adamw_8bit", "AdamW 8-bit", _PACKAGE, _plainly("adamw", storage="int8"), None),
        Contender("adamw_4bit", "AdamW 4-bit", _PACKAGE, _plainly("adamw", storage="int4"), None),
        Contender("galore_8bit", "GaLore 8-bit", _PACKAGE, galore_8bit),
        Contender("q_galore", "Q-GaLore", _PACKAGE, _q_galore_int8),
        Contender(*q_galore, work="q_galore_fp32"),
    ]


def _low_rank() -> list[Contender]:
    coap_8bit = _ours("coap", scale=SCALE, storage=_COAP_MOMENTS)
    osd = _ours("online_subspace_descent", gap=None, scale=SCALE)
    both = _ours("subset_norm_subspace_momentum")
    both_name = "Subset-Norm + Subspace-Momentum"
    dct = _ours("dct_adamw", error_feedback=False, rotate=False)
    dct_ef = _ours("dct_adamw", gap=None)
    blocks = _ours("frugal", rank=None, gap="update_gap", density=0.25)
    svd = _ours(
        "frugal",
        rank=None,
        gap="update_gap",
        density=0.25,
        projection="svd",
        finder="randomized",
    )
    return [
        Contender("coap", "COAP", _PACKAGE, _ours("coap", scale=SCALE)),
        Contender("coap", "COAP 8-bit", _PACKAGE, coap_8bit, work="coap_8bit"),
        Contender("osd", "Online Subspace Descent", _PACKAGE, osd, None),
        Contender("subset_norm", "Subset-Norm", _PACKAGE, _plainly("subset_norm"), None),
        Contender(
            "subspace_momentum", "Subspace-Momentum", _PACKAGE, _ours("subspace_momentum"), 1
        ),
        Contender("sn_sm", both_name, _PACKAGE, both, 1),
        Contender("dct_adamw", "DCT-AdamW", _PACKAGE, dct, 1),
        Contender("dct_adamw_ef", "DCT-AdamW, EF and rotation", _PACKAGE, dct_ef, None),
        Contender("trion", "Trion", _PACKAGE, _ours("trion", gap=None), None),
        Contender("subtrack", "SubTrack++", _PACKAGE, _ours("subtrack_pp", scale=SCALE)),
        Contender("ldadam", "LDAdam", _PACKAGE, _ours("ldadam", gap=None), None),
        Contender("flora", "Flora", _PACKAGE, _ours("flora", gap="kappa"), 1),
        Contender("frugal", "FRUGAL", _PACKAGE, blocks),
        Contender("frugal_svd", "FRUGAL svd", _PACKAGE, svd),
    ]


def _full_size() -> list[Contender]:
    auon = _plainly("auon", as_released=True)
    hybrid = _plainly("hybrid_auon", as_released=True, ns_steps=5)
    # With gradients that never change, Adam's step settles at once and SGD would take over.
    swats = _plainly("swats", switch_tolerance=0.0)
    released = "the released form, as the authors' code has it"
    return [
        Contender("auon", "AuON", _PACKAGE, auon, None, released),
        Contender("hybrid_auon", "Hybrid-AuON", _PACKAGE, hybrid, None, f"{released}; 5 steps"),
        Contender("muon", "Muon", _PACKAGE, _plainly("muon"), None, "float32 Newton-Schulz"),
        Contender("badam", "BAdam", _PACKAGE, _badam),
        Contender("swats", "SWATS", _PACKAGE, swats, None, "kept from switching to SGD"),
    ]


def _others() -> list[Contender]:
    """Methods without official code, or whose official code does not run."""
    plus = _ours("galore_plus", scale=SCALE, named=True, warmup=1)
    fismo = _ours("fismo", rank=None, gap="root_interval")
    made = [
        ("GaLore 2", _ours("galore2", scale=SCALE), "galore", ""),
        ("GaLore+", plus, "galore_plus", "its warm-up, in which it does more, left out"),
        ("GrassWalk", _ours("grasswalk", scale=SCALE), "subtrack", ""),
        ("GrassJump", _ours("grassjump", scale=SCALE), "subtrack", ""),
        ("SARA", _ours("sara", scale=SCALE), "galore", ""),
        ("GUM", _ours("gum"), "gum", "2 matrices at full size"),
        ("Tensor-GaLore", _ours("tensor_galore", scale=SCALE), "galore", "matrices only"),
        ("FISMO", fismo, "fismo", "inverse roots computed at refreshes only"),
    ]
    rows = [
        Contender("others", name, _PACKAGE, build, note=note, work=work)
        for name, build, work, note in made
    ]
    polynomial = _plainly("polynomial")
    last = Contender("others", "Polynomial", _PACKAGE, polynomial, None, work="polynomial")
    return [*rows, last]


def our_contenders() -> list[Contender]:
    """Every recipe, in the settings of the family that it belongs to."""
    return [*_earlier(), *_low_bit(), *_low_rank(), *_full_size(), *_others()]
