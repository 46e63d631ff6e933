"""The authors' own implementations: which are compared, and what each was given to run on a CPU.

Same hyper-parameters as in `contenders.py`. Code that needs something a CPU lacks is given it
without touching its arithmetic: calls that wait for a GPU do nothing, modules that are imported but
not used in a step are empty, names that are missing are supplied. Each row's `note` says which.
Code that is not on PyPI is taken from a folder, see `official_code.py`.

A family is one method. DCT-AdamW, LDAdam and AuON write into `.grad`, so that their later steps see
what the last one left; nothing in a step costs more or less for it.
"""

from __future__ import annotations

from benchmarks import official_full_size as full_size
from benchmarks import official_low_bit as low_bit
from benchmarks import official_low_rank as low_rank
from benchmarks.contenders import Builder, Contender

_WAIT = "torch.cuda.synchronize does nothing"
_BNB = "newer options of bitsandbytes switched off"
_GRAD = "gradients, which the step drops, set again before the next one"
_GALORE_8BIT = f"{_WAIT}; {_BNB}; {_GRAD}"
_Q_GALORE = f"{_WAIT}; {_BNB}, two that it dropped supplied; {_GRAD}"
_COAP = "tensorly, for convolutions, not imported; every fifth refresh is another, not timed kind"
_OSD = "wandb not imported; the basis moves at every step"
_SILENT = "its print silenced"
_ISTA = f"CUDA extensions, triton and wandb not imported; {_SILENT}"
_TRION = f"{_ISTA}; three undefined names supplied; one process; bfloat16 Newton-Schulz"
_SUBTRACK = (
    'identity sent to "cuda" stays on the CPU; plotting not imported; moments change basis one '
    "step before the refresh, in a step counted as normal"
)
_SQRT = "a square root that torch dropped, supplied"
_ADAMW = "embedding, head and norms by torch's fused AdamW"
_BADAM = (
    f"{_GRAD}; fp32 copies of what is active counted as state; plain group always active; {_SILENT}"
)


_FIRST_SHORT = 2  # its first block has one step less, and it changes at the end of a step


def _official(
    family: str,
    name: str,
    package: str,
    build: Builder,
    phase: int | None,
    note: str = "",
    *,
    work: str = "",
) -> Contender:
    return Contender(family, name, package, build, phase, note, work, official=True)


def _low_bit() -> list[Contender]:
    bnb, ao = ("AdamW 8-bit", "bitsandbytes"), "torchao"
    ao_8bit, ao_4bit = low_bit.torchao("AdamW8bit"), low_bit.torchao("AdamW4bit")
    int8, fp32 = low_bit.q_galore_int8, low_bit.q_galore
    package = "q-galore-torch"
    return [
        _official("adamw_8bit", *bnb, low_bit.adamw_8bit, None),
        _official("adamw_8bit", "AdamW 8-bit", ao, ao_8bit, None, "compiled"),
        _official("adamw_4bit", "AdamW 4-bit", ao, ao_4bit, None, "compiled"),
        _official(
            "galore_8bit", "GaLore 8-bit", "galore-torch", low_bit.galore_8bit, 0, _GALORE_8BIT
        ),
        _official("q_galore", "Q-GaLore", package, int8, 0, _Q_GALORE),
        _official(
            "q_galore", "Q-GaLore fp32 weights", package, fp32, 0, _Q_GALORE, work="q_galore_fp32"
        ),
    ]


def _low_rank() -> list[Contender]:
    coap, coap_8bit = low_rank.coap("CoapAdamW"), low_rank.coap("CoapAdamW8bit")
    norm, momentum = low_rank.sn_sm(norm=True), low_rank.sn_sm(momentum=True)
    both = low_rank.sn_sm(norm=True, momentum=True)
    ista, dynamic = "ISTA-DASLab-Optimizers", "DCT-AdamW, EF and rotation"
    dct, dct_fft = low_rank.dct_adamw(dynamic=True), low_rank.dct_adamw(dynamic=True, fft=True)
    blocks = low_rank.frugal("BlockAdamW", density=0.25)
    svd = low_rank.frugal("GaloreAdamW", density=0.25)
    osd = ("Online Subspace Descent", "Online-Subspace-Descent")
    in_gradient = "error kept in .grad, not state"
    return [
        _official("coap", "COAP", "coap", coap, 0, _COAP),
        _official("coap", "COAP 8-bit", "coap", coap_8bit, 0, _COAP, work="coap_8bit"),
        _official("osd", *osd, low_rank.online_subspace_descent, None, _OSD),
        _official("subset_norm", "Subset-Norm", "sn-sm", norm, None, _SILENT),
        _official("subspace_momentum", "Subspace-Momentum", "sn-sm", momentum, 1, _SILENT),
        _official("sn_sm", "Subset-Norm + Subspace-Momentum", "sn-sm", both, 1, _SILENT),
        _official("dct_adamw", "DCT-AdamW", ista, low_rank.dct_adamw(), 1, _ISTA),
        _official("dct_adamw_ef", dynamic, ista, dct, None, _ISTA),
        _official("dct_adamw_ef", f"{dynamic}, FFT", ista, dct_fft, None, _ISTA),
        _official("trion", "Trion", ista, low_rank.trion(), None, _TRION),
        _official("trion", "Trion, FFT", ista, low_rank.trion(fft=True), None, _TRION),
        _official("subtrack", "SubTrack++", "SubTrack", low_rank.subtrack, 0, _SUBTRACK),
        _official("ldadam", "LDAdam", "LDAdam", low_rank.ldadam, None, in_gradient),
        _official("flora", "Flora", "flora-opt", low_rank.flora, 1, _GRAD),
        _official("frugal", "FRUGAL", "FRUGAL", blocks, 0, _SQRT),
        _official("frugal_svd", "FRUGAL svd", "FRUGAL", svd, 0, _SQRT),
    ]


def _full_size() -> list[Contender]:
    auon, hybrid = full_size.auon("AuON"), full_size.auon("HybridAuON")
    muon, five = f"{_ADAMW}; bfloat16 Newton-Schulz", f"{_ADAMW}; 5 Newton-Schulz steps"
    third = "not by the authors"
    return [
        _official("auon", "AuON", "AuON", auon, None, _ADAMW),
        _official("hybrid_auon", "Hybrid-AuON", "AuON", hybrid, None, five),
        _official("muon", "Muon", "torch", full_size.muon, None, muon),
        _official("badam", "BAdam", "badam", full_size.badam, _FIRST_SHORT, _BADAM),
        _official("swats", "SWATS", "pytorch_optimizer", full_size.swats, None, third),
    ]


def official_contenders() -> list[Contender]:
    """All that run on a CPU, those of one family together."""
    return [*_low_bit(), *_low_rank(), *_full_size()]
