"""The tables behind the papers' memory headlines, from what the registered methods declare.

Elements are counted on the meta device with bfloat16 states, two bytes each; methods that are not
registered here (plain low-rank factors, ReLoRA, SLTrain) are formulas on the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from subspan.plan.model import ModelSpec, meta_model
from subspan.plan.parts import Parts, parts_of

SIZES = ("60m", "130m", "350m", "1b", "7b")
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
# Share of non-zero values in SLTrain's sparse part.
DELTA = {"60m": 0.03, "130m": 0.03, "350m": 0.03, "1b": 0.03, "7b": 0.05}
_BLOCKS = r"(self_attn|mlp)\..*weight$"

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Shapes:
    """Matrices of the blocks (rows, columns) and the number of all other values."""

    matrices: tuple[tuple[int, int], ...]
    others: int

    @property
    def blocks(self) -> int:
        """Values of the blocks' matrices."""
        return sum(m * n for m, n in self.matrices)

    @property
    def total(self) -> int:
        """All values."""
        return self.blocks + self.others

    def factors(self, rank: int) -> int:
        """Values of two factors per matrix, r (m + n)."""
        return sum(rank * (m + n) for m, n in self.matrices)

    def sparse(self, delta: float) -> int:
        """Values of SLTrain's sparse parts, floor(delta m n) each."""
        return sum(int(delta * m * n) for m, n in self.matrices)


@cache
def shapes(size: str, vocabulary: int = 32000) -> Shapes:
    """Of a LLaMA by name."""
    module = meta_model(ModelSpec(f"llama-{size}", vocab_size=vocabulary)).module
    named = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    inside = [(s[0], s[1]) for name, s in named if ".layers." in name and len(s) == 2]
    total = sum(p.numel() for p in module.parameters())
    return Shapes(tuple(inside), total - sum(m * n for m, n in inside))


@cache
def _parts(size: str, method: str, options: tuple[tuple[str, Any], ...]) -> Parts:
    return parts_of(meta_model(ModelSpec(f"llama-{size}")).module, method, dict(options))


def elements(size: str, method: str, **options: Any) -> dict[str, int]:
    """Elements of a method's state by kind, and in all under "total"."""
    frozen = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    kinds = _parts(size, method, tuple(sorted(frozen.items()))).states
    counted = {kind: bytes_ // 2 for kind, bytes_ in kinds.items() if kind != "scalar"}
    return {**counted, "total": sum(counted.values())}


def galore(size: str, **options: Any) -> dict[str, int]:
    """Elements of GaLore's state at the literature's rank."""
    return elements(size, "galore", rank=RANKS[size], **options)


def inside_blocks(size: str, method: str, **options: Any) -> int:
    """Elements of the state of the blocks' matrices alone."""
    parts = _parts(size, method, tuple(sorted(options.items())))
    return sum(
        size // 2
        for held in parts.parameters
        if ".layers." in held.name and len(held.shape) == 2
        for size in held.states.values()
    )


def reduction(part: float, whole: float) -> float:
    """By how much less, in percent."""
    return 100 * (1 - part / whole)


def _both(size: int) -> str:
    return f"{size / 1e9:.3f} ({size / 2**30:.3f})"


def states() -> Table:
    """Parameters and bytes of optimizer states."""
    adam = {size: elements(size, "adamw")["total"] for size in SIZES}
    own = {size: galore(size) for size in SIZES}
    moments = {size: own[size]["total"] - own[size]["basis"] for size in SIZES}
    head = {size: galore(size, project=[_BLOCKS, "^lm_head"])["total"] for size in SIZES}
    blocks = {
        size: reduction(
            inside_blocks(size, "galore", rank=RANKS[size]), inside_blocks(size, "adamw")
        )
        for size in SIZES
    }

    def row(name: str, cell: Any) -> list[str]:
        return [name, *(str(cell(size)) for size in SIZES)]

    def percent(value: Any) -> Any:
        return lambda size: f"{value(size):.1f} %"

    rows = [
        row("parameters, M", lambda s: f"{shapes(s).total / 1e6:.2f}"),
        row("in the blocks' matrices, M", lambda s: f"{shapes(s).blocks / 1e6:.2f}"),
        row("others, M", lambda s: f"{shapes(s).others / 1e6:.2f}"),
        row("rank", lambda s: RANKS[s]),
        row("weights, GB", lambda s: f"{2 * shapes(s).total / 1e9:.3f}"),
        row("Adam states, GB (GiB)", lambda s: _both(2 * adam[s])),
        row("GaLore states, GB (GiB)", lambda s: _both(2 * own[s]["total"])),
        row("GaLore less than Adam", percent(lambda s: reduction(own[s]["total"], adam[s]))),
        row("- projector not counted", percent(lambda s: reduction(moments[s], adam[s]))),
        row("- blocks' matrices alone", percent(lambda s: blocks[s])),
        row("- head projected, too", percent(lambda s: reduction(head[s], adam[s]))),
        row(
            "GaLore in 8 bits, projector too, less than 16-bit Adam",
            percent(lambda s: reduction(own[s]["total"], 2 * adam[s])),
        ),
        row(
            "- projector kept in 16 bits",
            percent(lambda s: reduction(moments[s] + 2 * own[s]["basis"], 2 * adam[s])),
        ),
    ]
    return ["", *(size.upper() for size in SIZES)], rows


def weights_and_states(size: str) -> dict[str, int]:
    """Bytes of weights and two Adam states of two bytes each, by method."""
    shape, rank = shapes(size), RANKS[size]
    low = shape.factors(rank) + shape.others
    sparse = shape.sparse(DELTA[size])
    return {
        "full": 2 * (shape.total + elements(size, "adamw")["total"]),
        "low-rank factors": 6 * low,
        "ReLoRA, LoRA on a frozen base": 2 * (shape.total + shape.factors(rank)) + 4 * low,
        "GaLore, projector counted": 2 * (shape.total + galore(size)["total"]),
        "SLTrain, int64 index": 6 * (low + sparse) + 8 * sparse,
    }


# What research notes of this project, and the papers' own tables where marked, say.
PUBLISHED = {
    "full": (0.348, 0.805, 2.208, 8.034, 40.43),
    "low-rank factors": (0.257, 0.564, 1.111, 3.656, 16.93),
    "ReLoRA, LoRA on a frozen base": (0.307, 0.734, 1.716, 6.072, 29.88),
    "GaLore, projector counted": (0.280, 0.611, 1.389, 4.763, 22.88),
    "SLTrain, int64 index": (0.267, 0.600, 1.238, 4.163, 21.46),
}


def totals() -> Table:
    """Weights and states together, GB."""
    counted = {size: weights_and_states(size) for size in SIZES}
    rows = [
        [name, *(f"{counted[size][name] / 1e9:.3f}" for size in SIZES)] for name in counted["60m"]
    ]
    return ["", *(size.upper() for size in SIZES)], rows
