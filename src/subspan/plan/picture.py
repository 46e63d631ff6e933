"""Plans as stacked bars: SVG written here, PNG by matplotlib where it is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from subspan.plan.budget import COUNTING
from subspan.plan.result import Plan
from subspan.plan.show import NAMES, heading, method_words
from subspan.train.errors import JobError
from subspan.train.files import write_text

# Parts at the fullest moment, in the order of the bar, with colours that differ in lightness too.
COLOURS = {
    "weights": "#33508f",
    "first_moment": "#0f8a8a",
    "second_moment": "#63bfae",
    "basis": "#c8a200",
    "error": "#8a6d3b",
    "gradients": "#d9703a",
    "activations": "#a64d8a",
    "temporary": "#8c8c8c",
}
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 980, 318, 74, 26, 96


def segments(plan: Plan) -> dict[str, int]:
    """Bytes of every part at the fullest moment of a plan; they add up to its peak."""
    parts = {"weights": plan.weights + plan.buffers}
    for kind in ("first_moment", "second_moment", "basis", "error"):
        parts[kind] = plan.states.get(kind, 0)
    parts["error"] += plan.states.get("scalar", 0)
    if plan.peak is None:
        return {**parts, "gradients": plan.gradients}
    peak = plan.peak
    return {
        **parts,
        "gradients": peak.gradients,
        "activations": peak.activations,
        "temporary": peak.temporary,
    }


def write_picture(path: Path, plans: Sequence[Plan], budget: int | None = None) -> None:
    """Write the bars of some plans as .svg or .png.

    Raises:
        JobError: another kind of file, nothing to draw, or no matplotlib for .png.
    """
    ordered = sorted(plans, key=lambda plan: plan.needed)
    if not ordered:
        raise JobError(f"--picture {path}: there is no plan to draw")
    if path.suffix == ".svg":
        write_text(path, svg(ordered, budget))
    elif path.suffix == ".png":
        _png(path, ordered, budget)
    else:
        raise JobError(f"--picture {path} must end in .svg or .png")


def svg(plans: Sequence[Plan], budget: int | None = None) -> str:
    """The bars as one self-contained SVG, readable in light and dark."""
    most = max(*(plan.needed for plan in plans), budget or 0) / 1e9
    step = _step(most)
    scale = (_WIDTH - _LEFT - _RIGHT) / (math.ceil(most / step) * step)
    height = _TOP + _ROW * len(plans) + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="title">',
        f'<title id="title">Memory plan of {escape(plans[0].label)}</title>',
        "<style>:root{color-scheme:light dark}text{font:13px system-ui,sans-serif;fill:#222}"
        ".dim{fill:#666;font-size:12px}.head{font-weight:600;font-size:16px}.back{fill:#fff}"
        ".rule{stroke:#ddd}.budget{stroke:#c22;stroke-dasharray:5 4}"
        "@media(prefers-color-scheme:dark){text{fill:#eee}.dim{fill:#aaa}.back{fill:#16181c}"
        ".rule{stroke:#3a3d44}.budget{stroke:#f66}}</style>",
        f'<rect class="back" width="{_WIDTH}" height="{height}"/>',
        f'<text class="head" x="16" y="28">Memory at the fullest moment: '
        f"{escape(plans[0].label)}</text>",
        f'<text class="dim" x="16" y="48">{escape(_subtitle(plans))}</text>',
        *_legend(),
        *_axis(step, scale, most, height),
    ]
    for place, plan in enumerate(plans):
        parts += _bar(plan, _TOP + _ROW * place, scale)
    if budget is not None:
        x = _LEFT + budget / 1e9 * scale
        bottom = _TOP + _ROW * len(plans)
        parts.append(f'<line class="budget" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="dim" x="{x + 4:.1f}" y="{bottom + 12}">budget {budget / 1e9:g} GB</text>'
        )
    note = (
        "GB = 10^9 bytes; bases (projectors) are counted as state; activations and the optimizer's "
        "step are estimates"
    )
    parts.append(f'<text class="dim" x="16" y="{height - 10}">{escape(note)}</text></svg>')
    return "\n".join(parts) + "\n"


def _subtitle(plans: Sequence[Plan]) -> str:
    """What all ways of training share."""
    shared = [heading(plan).partition(": ")[2].split(", ") for plan in plans]
    common = [word for word in shared[0] if all(word in words for words in shared)]
    return ", ".join(common)


def _legend() -> list[str]:
    parts, x = [], 16
    for name, colour in COLOURS.items():
        label = {"temporary": "optimizer step", "basis": "bases"}.get(name, NAMES[name])
        parts.append(f'<rect x="{x}" y="62" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(f'<text class="dim" x="{x + 17}" y="73">{label}</text>')
        x += 34 + 7 * len(label)
    return parts


def _axis(step: float, scale: float, most: float, height: int) -> list[str]:
    parts = []
    for number in range(math.ceil(most / step) + 1):
        x = _LEFT + number * step * scale
        parts.append(
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - 56}"/>'
            f'<text class="dim" x="{x:.1f}" y="{height - 30}" text-anchor="middle">'
            f"{number * step:g}{' GB' if number == 0 else ''}</text>"
        )
    return parts


def _bar(plan: Plan, y: int, scale: float) -> list[str]:
    label = method_words(plan.settings)
    short = label if len(label) <= 42 else f"{label[:41]}…"
    parts = [
        f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(short)}'
        f"<title>{escape(label)}</title></text>"
    ]
    x = float(_LEFT)
    for name, size in segments(plan).items():
        width = size / 1e9 * scale
        if size:
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 4}" width="{width:.2f}" height="{_ROW - 8}" '
                f'fill="{COLOURS[name]}"><title>{NAMES[name]}: {size / 1e9:.3f} GB</title></rect>'
            )
        x += width
    total = f"{plan.needed / 1e9:.2f}{'' if plan.peak is not None else ' or more'}"
    parts.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{total}</text>')
    return parts


def _step(most: float) -> float:
    """A round distance of the axis's lines."""
    power = 10 ** math.floor(math.log10(max(most, 1e-9) / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= 8)


def _png(path: Path, plans: Sequence[Plan], budget: int | None) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise JobError(f"--picture {path} needs matplotlib; write .svg instead") from None
    figure = Figure(figsize=(9.6, 1.9 + 0.28 * len(plans)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    starts = [0.0] * len(plans)
    names = [method_words(plan.settings) for plan in plans]
    places = range(len(plans), 0, -1)
    for part, colour in COLOURS.items():
        sizes = [segments(plan).get(part, 0) / 1e9 for plan in plans]
        axes.barh(places, sizes, left=starts, color=colour, label=NAMES[part])
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    axes.set_yticks(list(places), names, fontsize=7)
    axes.set_xlabel(f"GB ({COUNTING})", fontsize=7)
    axes.set_title(
        f"Memory at the fullest moment: {plans[0].label}\n{_subtitle(plans)}", fontsize=8
    )
    if budget is not None:
        axes.axvline(budget / 1e9, color="#c22", linestyle="--", label="budget")
    figure.legend(loc="outside lower center", ncols=5, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
