"""What ranks send each other in a step, as formulas, and docs/SCALING.md's tables of them.

python -m subspan.optim.traffic          writes the tables into docs/SCALING.md
python -m subspan.optim.traffic --check  exits with 1 if they are out of date

For a matrix of m x n with d the size of its projected side, c = mn / d the other one, rank r, and N
ranks that hold equal pieces, all ranks together send

    "entries"  nothing
    "slices"   in a step      k numbers per rank, summed (norms of the matrix)
               at a refresh   (N - 1) / N (mn + rc if the finder reads the momentum) + (N - 1) B
    "whole"    in a step      (N - 1) / N 3 mn: gradient and weight to the owner, the weight back

elements, where B is what the finder keeps (rd for a basis, 0 if all ranks can draw it). This comes
on top of what FSDP2 itself sends. Under DDP's hook every rank all-reduces rc elements, not mn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from subspan.linalg import compute_dtype
from subspan.optim.composition import Composition
from subspan.optim.ddp import objection
from subspan.optim.groups import lay_out
from subspan.optim.parts.refresh import Every, Lazy
from subspan.optim.placing import Way, way_of
from subspan.optim.registry import Recipe, methods
from subspan.subspaces.layout import Layout

PAGE = Path("docs/SCALING.md")
# Per entry and step: weights in bf16, gathered forward and backward, gradients in float32.
_FSDP_BYTES = 2 + 2 + 4
GATHERED = 3  # gradient and weight to the owner, and the new weight back


@dataclass(frozen=True)
class Sent:
    """Bytes that all ranks together send for one parameter.

    Args:
        way: how it is updated.
        step: in every step.
        refresh: more in a step with a refresh.
        first: the same of the first refresh, when there is no momentum to read.
        norms: numbers that each rank puts into an all-reduce in every step.
        kept: bytes of the basis, which every rank keeps.
    """

    way: Way
    step: int = 0
    refresh: int = 0
    first: int = 0
    norms: int = 0
    kept: int = 0


def sent(
    layout: Layout, parts: Composition, dim: int, ranks: int, dtype: torch.dtype = torch.float32
) -> Sent:
    """What a sharded parameter costs, apart from FSDP2's own traffic and the check for NaN.

    Args:
        layout: of the whole parameter.
        parts: what updates it.
        dim: along which it is cut in pieces of equal size (the last ones may be smaller).
        ranks: number of pieces.
        dtype: of weights and gradients.
    """
    way = way_of(layout, parts, dim)
    size = layout.natural[dim] if layout.natural else 1
    # Pieces travel with the size of the first one; a rank's own stays where it is.
    moved = (ranks - 1) * -(-size // ranks) * (layout.natural_size // max(1, size))
    if way == "whole":
        return Sent(way, GATHERED * moved * dtype.itemsize)
    finder, norms = parts.finder, _norms(layout, parts)
    if finder is None or not finder.reads_gradient:
        return Sent(way, norms=norms, kept=_kept(layout, parts, dtype))
    first, momenta = moved * dtype.itemsize, 0
    if "error" in parts.slots(layout, dtype):
        first = moved * compute_dtype(dtype).itemsize
    if finder.reads_momentum and parts.inner.first_moment is not None:
        _, (_, kind) = parts.slots(layout, dtype)[parts.inner.first_moment]
        momenta = moved // layout.side_size * layout.rank * kind.itemsize
    basis = sum(
        math.prod(layout.shape(item.shape))
        * (8 if item.dtype == torch.int32 else compute_dtype(dtype).itemsize)
        for item in finder.declare(layout)
    )
    first += (ranks - 1) * basis
    return Sent(way, 0, first + momenta, first, norms, _kept(layout, parts, dtype))


def sent_by_hook(layout: Layout, parts: Composition, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a rank puts into DDP's all-reduce in a step without a refresh."""
    elements = layout.natural_size
    one_matrix = layout.projected and len(layout.natural) == 2
    if one_matrix and parts.finder is not None and objection(parts) is None:
        elements = math.prod(layout.coordinates)
    return elements * dtype.itemsize


def _norms(layout: Layout, parts: Composition) -> int:
    """Numbers that the pieces of a parameter have to add up in a step."""
    if parts.inner.concludes:
        return sum(layout.shape(item.shape) == () for item in parts.inner.declare(layout))
    return parts.output.norms + parts.remainder.norms if parts.finder is not None else 0


def _kept(layout: Layout, parts: Composition, dtype: torch.dtype) -> int:
    slots = parts.slots(layout, dtype).values()
    return sum(
        math.prod(shape) * dtype.itemsize for kind, (shape, dtype) in slots if kind == "basis"
    )


# ---------------------------------------------------------------------- the table of methods


def formulas(layout: Layout, parts: Composition, dim: int) -> tuple[str, str, str]:
    """Way, elements per step and more per refresh, in m, n, r and N, without (N - 1) / N.

    The factor is common to all of them: it turns "mn" into what all ranks together send when they
    gather a matrix, and "N nr" into what they send when one of them broadcasts a basis.
    """
    way, finder = way_of(layout, parts, dim), parts.finder
    if way == "whole":
        return way, f"{GATHERED} mn", "0"
    side, other = ("n", "m") if layout.side == "right" else ("m", "n")
    norms = _norms(layout, parts)
    step = f"{norms} sum{'s' * (norms > 1)}" if norms else "0"
    terms = []
    if finder is not None and finder.reads_gradient:
        terms.append("mn")
        if finder.reads_momentum and parts.inner.first_moment is not None:
            terms.append(f"{other}r")
        for item in finder.declare(layout):
            terms.append("N 2r" if item.shape == "index" else f"N {side}r")
    return way, step, " + ".join(terms) or "0"


def _layout(recipe: Recipe, m: int, n: int, projected: bool = True) -> tuple[Layout, Composition]:
    group = dict(recipe.defaults)
    composition = recipe.compose(group)
    weight = torch.empty(m, n, device="meta")
    projected = projected and composition.selective
    layout = lay_out(group, composition, weight, "layers.0.weight", 0, projected)
    return layout, composition.parts_for(layout)


def _gap(parts: Composition) -> str:
    if parts.finder is None:
        return "-"
    policy = parts.refresh
    if isinstance(policy, Every | Lazy):
        return str(policy.gap) + "+" * isinstance(policy, Lazy)
    return "once"


def table() -> str:
    """Every recipe: what it sends for tall and wide matrices, and for what it does not project."""
    head = (
        "method",
        "refresh every",
        "m >= n, rows cut",
        "per step",
        "per refresh",
        "m < n, rows cut",
        "m < n, columns cut",
        "embeddings, head",
        "DDP hook, per step",
    )
    rows = [head, ("---",) * len(head)]
    for recipe in sorted(methods().values(), key=lambda entry: entry.title.lower()):
        tall, parts = _layout(recipe, 4096, 1024)
        wide, wide_parts = _layout(recipe, 1024, 4096)
        plain, plain_parts = _layout(recipe, 32000, 1024, False)
        way, step, refresh = formulas(tall, parts, 0)
        accepted = objection(parts) is None
        hook = ("mr" if tall.side == "right" else "rn") if accepted else "refused"
        rows.append(
            (
                recipe.title,
                _gap(parts),
                way,
                step,
                refresh,
                formulas(wide, wide_parts, 0)[0],
                formulas(wide, wide_parts, 1)[0],
                way_of(plain, plain_parts, 0),
                hook,
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---------------------------------------------------------------------- projected costs


@dataclass(frozen=True)
class Scale:
    """A model and the machines that train it.

    Args:
        title: for the table.
        matrices: shape and number of the projected matrices.
        ranks: number of GPUs, among which every parameter is cut.
        bandwidth: bytes per second that a GPU sends and, at the same time, receives.
        rank: of the subspaces.
        network: what has that bandwidth.
    """

    title: str
    matrices: tuple[tuple[tuple[int, int], int], ...]
    ranks: int
    bandwidth: float
    rank: int
    network: str


SCALES = (
    Scale(
        "7B (LLaMA 2) on 8",
        (((4096, 4096), 4 * 32), ((11008, 4096), 2 * 32), ((4096, 11008), 32)),
        8,
        450e9,
        1024,
        "NVLink 4 within a node, 450 GB/s per direction and GPU (H100 data sheet)",
    ),
    Scale(
        "70B (LLaMA 2) on 256",
        (
            ((8192, 8192), 2 * 80),
            ((1024, 8192), 2 * 80),
            ((28672, 8192), 2 * 80),
            ((8192, 28672), 80),
        ),
        256,
        50e9,
        1024,
        "InfiniBand NDR, 400 Gb/s = 50 GB/s per direction and GPU",
    ),
)
SHOWN = ("galore", "fira", "coap", "dct_adamw", "ldadam", "muon")


def projected(scale: Scale, method: str) -> dict[str, float]:
    """Seconds and bytes per rank that follow from the formulas; matrices cut as they should be.

    Time is that of the busiest rank, which receives in every round a whole matrix, and a basis from
    each of the others: as long as the largest matrix takes at the bandwidth, all rounds taken to be
    full. Latency and overlap are left out.
    """
    recipe = methods()[method]
    found: dict[str, float] = {"step": 0.0, "refresh": 0.0, "bytes": 0.0, "kept": 0.0}
    group = dict(recipe.defaults) | ({"rank": scale.rank} if "rank" in recipe.defaults else {})
    composition = recipe.compose(group)
    rounds: dict[str, list[int]] = {"step": [], "refresh": []}
    gap = 1
    for (m, n), count in scale.matrices:
        weight = torch.empty(m, n, device="meta")
        layout = lay_out(group, composition, weight, "layers.0.weight", 0, composition.selective)
        parts = composition.parts_for(layout)
        dim = 1 if way_of(layout, parts, 1) == "slices" and m < n else 0
        cost = sent(layout, parts, dim, scale.ranks)
        gap = parts.refresh.gap if isinstance(parts.refresh, Every) else gap
        found["kept"] += count * cost.kept
        for kind in rounds:
            rounds[kind] += [getattr(cost, kind)] * count
    for kind, sizes in rounds.items():
        ordered = sorted(sizes, reverse=True)
        found[kind] = sum(ordered[:: scale.ranks]) / scale.bandwidth
    found["bytes"] = (sum(rounds["step"]) + sum(rounds["refresh"]) / gap) / scale.ranks
    found["mean"] = found["step"] + found["refresh"] / gap
    return found


def costs() -> str:
    """The table of projected costs."""
    rows = [
        "| model, GPUs | method | sent per GPU and step, mean | time per step | more at a refresh "
        "| mean | bases kept on every GPU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for scale in SCALES:
        entries = sum(m * n * count for (m, n), count in scale.matrices)
        own = _FSDP_BYTES * entries * (scale.ranks - 1) / scale.ranks
        time = f"{1e3 * own / scale.bandwidth:,.1f} ms"
        size = f"{own / 1e9:.2f} GB"
        rows.append(f"| {scale.title} | FSDP2 itself | {size} | {time} | - | {time} | - |")
        for method in SHOWN:
            cost = projected(scale, method)
            title = methods()[method].title
            cells = (
                scale.title,
                f"{title}, r = {scale.rank}" if "rank" in methods()[method].defaults else title,
                f"{cost['bytes'] / 1e9:.2f} GB",
                *(f"{1e3 * cost[key]:.1f} ms" for key in ("step", "refresh", "mean")),
                f"{cost['kept'] / 1e9:.1f} GB",
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


# ---------------------------------------------------------------------- the page

_TABLES = {"methods": table, "costs": costs}


def filled(text: str) -> str:
    """The page with its generated tables as they are now."""
    for name, make in _TABLES.items():
        start, end = f"<!-- begin {name}", f"<!-- end {name} -->"
        head, _, rest = text.partition(start)
        mark, _, rest = rest.partition("\n")
        _, _, tail = rest.partition(end)
        text = f"{head}{start}{mark}\n{make()}\n{end}{tail}"
    return text


def main(arguments: Iterable[str]) -> int:
    """Write the tables, or with --check compare them with the page; returns the exit status."""
    given, text = list(arguments), PAGE.read_text()
    if given == ["--check"]:
        if filled(text) == text:
            return 0
        print(f"{PAGE} is out of date: run `python -m subspan.optim.traffic`", file=sys.stderr)
        return 1
    if given:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
