"""The memory claims of the papers, recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.headline_tables import elements, galore, reduction, shapes
from subspan.plan import ModelSpec, Settings, make_plan


@dataclass(frozen=True)
class Claim:
    """One claim and what arithmetic says about it.

    Args:
        paper: short title.
        claim: as published, with its number.
        computed: the recomputed numbers and the rule behind each.
        verdict: reproduces, bracketed, consistent, contradicted or not arithmetic.
    """

    paper: str
    claim: str
    computed: str
    verdict: str


def _verdict(published: float, value: float, tolerance: float) -> str:
    """Whether a number agrees with a published one."""
    gap = abs(value - published)
    if gap <= tolerance:
        return "**reproduces**"
    return f"differs by {gap:.1f} points"


def _bracket(published: float, values: list[float]) -> str:
    low, high = min(values), max(values)
    inside = low <= published <= high
    return f"{'bracketed' if inside else 'outside'} ({low:.1f}-{high:.1f})"


def galore_claims() -> Iterator[Claim]:
    """GaLore, Q-GaLore and COAP, from the registered recipes."""
    paper = "GaLore"
    adam, own = elements("7b", "adamw")["total"], galore("7b")
    head = galore("7b", project=[r"(self_attn|mlp)\..*weight$", "^lm_head"])["total"]
    standard, projected = reduction(own["total"], adam), reduction(head, adam)
    yield Claim(
        paper,
        "up to 65.5 % less optimizer state",
        f"7B, rank 1024: {standard:.1f} %; head projected too: {projected:.1f} %",
        _bracket(65.5, [standard, projected]),
    )
    moments = own["total"] - own["basis"]
    few, kept = reduction(own["total"], 2 * adam), reduction(moments + 2 * own["basis"], 2 * adam)
    yield Claim(
        paper,
        "8-bit: optimizer 82.5 % less than bfloat16 Adam",
        f"projector in one byte: {few:.2f} %; in two: {kept:.1f} %",
        _verdict(82.5, few, 0.06) + ", if the projector is counted at one byte",
    )
    weights, largest, activations = 2 * shapes("7b").total, 2 * 32000 * 4096, 2e9
    used = [weights + moments + size * own["basis"] + largest + activations for size in (1, 2)]
    whole = 8 * shapes("7b").total + activations
    shares = [reduction(u, w) for u in used for w in (whole, 58e9)]
    yield Claim(
        paper,
        "8-bit: total memory 63.3 % less",
        f"weights, states, largest gradient and 2 GB of activations: {used[0] / 1e9:.1f} to "
        f"{used[1] / 1e9:.1f} GB; against {whole / 1e9:.1f} and the paper's 58 GB: "
        f"{min(shares):.1f} to {max(shares):.1f} %",
        _bracket(63.3, shares) + "; depends on the baseline",
    )
    yield _on_24_gigabytes()
    yield from _q_galore()
    adam, own = elements("1b", "adamw")["total"], elements("1b", "coap", rank=512)
    yield Claim(
        "COAP",
        "LLaMA-1B: optimizer memory 61 % less",
        f"rank 512, projector counted: {reduction(own['total'], adam):.1f} %",
        _verdict(61, reduction(own["total"], adam), 0.5),
    )
    eight = reduction(own["total"], 2 * adam)
    yield Claim(
        "COAP",
        "8-bit: 81 % less (LLaVA-7B)",
        f"the 1B model with one byte for everything: {eight:.1f} %; LLaVA's shapes not recomputed",
        "consistent",
    )


def _on_24_gigabytes() -> Claim:
    settings = Settings(
        ModelSpec("llama-7b", sequence_length=256),
        method="galore",
        options={"rank": 1024, "storage": "int8"},
        batch_size=16,
        update_in_backward=True,
        clipping="each",
        checkpointing="full",
    )
    peak = make_plan(settings).needed
    return Claim(
        "GaLore",
        "7B pre-training on 24 GB",
        f"`subspan plan` of this library's GaLore, int8 states with scales, updates in the "
        f"backward pass, 16 x 256 tokens, activations recomputed: {peak / 1e9:.1f} GB",
        "consistent; the abstract's run recomputes nothing",
    )


def _q_galore() -> Iterator[Claim]:
    shape, own = shapes("7b"), elements("7b", "galore", rank=1024)
    weights = shape.blocks + 2 * shape.others
    moments, basis = own["total"] - own["basis"], own["basis"] / 2
    total = weights + moments + basis
    with_rest = [total + 2 * 32000 * 4096 + extra for extra in (2e9, 4e9)]
    yield Claim(
        "Q-GaLore",
        "7B on 16 GB",
        f"int8 matrices, bfloat16 others {weights / 1e9:.2f}, 8-bit moments {moments / 1e9:.2f}, "
        f"int4 projectors {basis / 1e9:.2f}: {total / 1e9:.2f} GB ({total / 2**30:.2f} GiB); with "
        f"the largest gradient and 2 to 4 GB of activations {with_rest[0] / 1e9:.1f} to "
        f"{with_rest[1] / 1e9:.1f}",
        "**reproduces**" if with_rest[1] <= 16 * 2**30 else "contradicted",
    )
    yield Claim(
        "Q-GaLore",
        "fine-tuning: up to 50 % less than LoRA and GaLore",
        "weights of 8 instead of 16 bits halve the largest term",
        "structural bound",
    )


def subspace_claims() -> Iterator[Claim]:
    """Subset-Norm and Subspace-Momentum."""
    adam = elements("1b", "adamw")["total"]
    shape = shapes("1b")
    norms = sum(max(m, n) for m, n in shape.matrices)

    def share(rank: int, stored: bool, embeddings: int) -> float:
        moment = sum(rank * max(m, n) for m, n in shape.matrices)
        basis = sum(rank * min(m, n) for m, n in shape.matrices) if stored else 0
        return 100 * (moment + norms + basis + embeddings) / adam

    whole, normed = 2 * shape.others, shape.others + 2 * 32000
    cases = {
        "rank 512, no stored projector, Adam on the rest": share(512, False, whole),
        "with projector": share(512, True, whole),
        "rank 256 with projector": share(256, True, whole),
        "rank 512 with projector, Subset-Norm on embeddings too": share(512, True, normed),
    }
    own = elements("1b", "subset_norm_subspace_momentum", rank=512)["total"]
    yield Claim(
        "Subset-Norm + Subspace-Momentum",
        "20 % of Adam's state (1B)",
        "; ".join(f"{name}: {value:.1f} %" for name, value in cases.items())
        + f"; the recipe here at rank 512: {100 * own / adam:.1f} %",
        _bracket(20, list(cases.values())),
    )
    steps = [tokens / 131072 / 1e3 for tokens in (13.1e9, 6.8e9)]
    yield Claim(
        "Subset-Norm + Subspace-Momentum",
        "Adam's perplexity in half the tokens (6.8 of 13.1 B)",
        f"{steps[1]:.0f} of {steps[0]:.0f} thousand steps of 131072 tokens",
        "needs a run; the token counts agree",
    )


def factor_claims() -> Iterator[Claim]:
    """Methods that train factors: SLTrain, SwitchLoRA, refactorised factors, SST, WeLore."""
    shape = shapes("7b")
    full = 8 * shape.total

    def sltrain(delta: float, index: int) -> float:
        sparse = shape.sparse(delta)
        values = shape.factors(1024) + shape.others + sparse
        return reduction(2 * values + index * sparse + 2 * values, full)

    cases = [
        ("delta 0.05, int64 index", 0.05, 8),
        ("delta 0.03", 0.03, 8),
        ("int32 index", 0.05, 4),
    ]
    values = [(name, sltrain(delta, index)) for name, delta, index in cases]
    yield Claim(
        "SLTrain",
        "up to 73 % less at 7B (8 bits, updates per layer)",
        "weights, index and 8-bit states against bfloat16 Adam with gradients: "
        + "; ".join(f"{name} {value:.1f} %" for name, value in values),
        _bracket(73, [value for _, value in values]),
    )
    shape = shapes("1b", 32100)
    low = shape.factors(512) + shape.others
    fewer = reduction(low, shape.total)
    yield Claim(
        "SwitchLoRA",
        "54 % less communication (1.3B)",
        f"{low / 1e6:.0f} of {shape.total / 1e6:.1f} M values are trained: {fewer:.1f} % less",
        _verdict(54, fewer, 0.55),
    )
    stored = shape.total + shape.factors(512)
    with_gradients = reduction(stored + 3 * low, 4 * shape.total)
    without = reduction(stored + 2 * low, 3 * shape.total)
    yield Claim(
        "SwitchLoRA",
        "13 % less memory",
        f"weights, gradients and states: {with_gradients:.1f} %; without gradients {without:.1f} %",
        "not from shapes alone; needs activations in the denominator",
    )
    shape = shapes("1b")
    low, own = shape.factors(512) + shape.others, shape.total + galore("1b")["total"]
    states, trained = reduction(3 * low, own), reduction(4 * low, own + shape.total)
    yield Claim(
        "Scalable Parameter and Memory Efficient Pretraining",
        "about 25 % less than GaLore (1B)",
        f"weights and states: {6 * low / 1e9:.3f} against {2 * own / 1e9:.3f} GB, {states:.1f} %; "
        f"with gradients {trained:.1f} %",
        _bracket(25, [states, trained]),
    )
    yield Claim(
        "SST",
        "8.3 % of the embedding size (OPT-125M)",
        f"rank 64 of 768: {100 * 64 / 768:.2f} %; U, V stored are larger than the weight",
        _verdict(8.3, 100 * 64 / 768, 0.05),
    )
    kept = _welore()
    yield Claim(
        "WeLore",
        "50 % compressed fine-tuning",
        f"half of every rank keeps {kept:.1f} % of LLaMA-2-7B's block values",
        "contradicted, if read as parameters; 50 % is the rank",
    )


def _welore() -> float:
    """Values of half-rank factors where those are fewer, in percent."""
    matrices = shapes("7b").matrices
    held = sum(min(m * n, min(m, n) // 2 * (m + n)) for m, n in matrices)
    return 100 * held / shapes("7b").blocks


def format_claims() -> Iterator[Claim]:
    """Weights in few bits, adapters of vectors, caches, experts."""
    whole, outside = 8.030e9, 2 * 128256 * 4096
    ratios = [4 / (1 - cut * (whole - outside) / whole) for cut in (0.0, 0.15, 0.35)]
    scaled = [ratio * 4 / (4 + 16 / 128) for ratio in ratios]
    yield Claim(
        "UniQL",
        "4x to 5.7x less memory (Llama-3-8B)",
        "4-bit weights, 0, 15 and 35 % of the blocks cut: "
        + ", ".join(f"{ratio:.2f}x" for ratio in ratios)
        + f"; with a 16-bit scale per 128: {scaled[0]:.2f}x to {scaled[-1]:.2f}x",
        "**reproduces** with ideal bits" if abs(ratios[-1] - 5.7) < 0.06 else "differs",
    )
    mine = 32 * (7 * 256 + 4 * 4096 + 2 * 11008 + 4096)
    lora = 64 * 32 * (4 * 8192 + 3 * (4096 + 11008))
    yield Claim(
        "VeRA",
        "1.4 M trained values on LLaMA-2-7B",
        f"rank 256 on all seven matrices: {mine / 1e6:.3f} M; LoRA of rank 64 {lora / 1e6:.1f} M, "
        f"{lora / mine:.0f} times as many",
        _verdict(1.4, mine / 1e6, 0.05),
    )
    yield Claim(
        "DiscQuant",
        "3.25 bits per weight",
        f"3 bits and a 16-bit scale per 64: {3 + 16 / 64:.2f}",
        _verdict(3.25, 3 + 16 / 64, 0.0),
    )
    yield Claim(
        "MTLA",
        "8.3x less GPU memory (s = 2)",
        f"cache per token 1024 against (256 + 32) / 2 = 144 values: {1024 / 144:.1f}x",
        "same order; beam search is measured",
    )
    experts = 32 * 8 * 3 * 4096 * 14336
    rest = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    cut = [100 * share * experts / (experts + rest) for share in (0.25, 0.5)]
    yield Claim(
        "Sub-MoE",
        "25 and 50 % of the experts (Mixtral)",
        f"experts are {experts / 1e9:.2f} of {(experts + rest) / 1e9:.2f} B values: {cut[0]:.1f} "
        f"and {cut[1]:.1f} % of all",
        "arithmetic",
    )


# Claims about quality, time or measured memory, which shapes cannot decide.
OPEN = {
    "GaLore 2": "7B on up to 500 B tokens",
    "GaLore+": "SVD takes over 80 % of GaLore's time; 4x faster fine-tuning",
    "COAP": "2 % extra time, 4x faster than GaLore",
    "SwitchLoRA": "perplexity 15.23 to 15.01 at 1.3B",
    "ReLoRA": "comparable up to 350M",
    "LOST": "less memory and compute, no number",
    "LoRA-FA": "up to 1.4x less than LoRA: saves input activations and half of the states",
    "SVFit": "16x fewer parameters than LoRA: depends on k and r",
    "MatryoshkaKV": "90 % accuracy with 60 % of the cache removed",
    "Causal Grassmann": "within 10-15 % perplexity; a public reproduction finds 40-50 %",
}


def claims() -> list[Claim]:
    """All claims that are arithmetic."""
    return [*galore_claims(), *subspace_claims(), *factor_claims(), *format_claims()]
