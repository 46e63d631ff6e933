"""Horizontal bars in plain HTML: memory by part, and the time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from subspan.report.loading import Report
from subspan.report.words import bytes_text

# Parts of memory with a colour of their own, in the order of a bar.
_PARTS = (
    *("weights", "gradients", "first_moment", "second_moment", "basis", "error", "scalar"),
    *("activations", "temporary"),
)

Row = tuple[int, str, Mapping[str, float], str]
"""Index and name of the arm, bytes of each part, and what stands after the total."""


def state_bars(report: Report) -> str:
    """Optimizer state of every arm, divided by kind."""
    rows: list[Row] = [
        (index, arm.name, arm.result["state_bytes"], "")
        for index, arm in enumerate(report.arms)
        if arm.result
    ]
    note = "bytes of the tensors that live between two steps"
    return _stacked("Optimizer state", note, rows)


def planned_bars(report: Report) -> str:
    """What was planned for training, part by part, with the measured peak beside it."""
    rows: list[Row] = []
    for index, arm in enumerate(report.arms):
        result = arm.result
        if result and isinstance(result.get("planned_bytes"), dict):
            peak = result["peak_memory_bytes"]
            measured = peak.get("gpu") or peak["process"]
            parts = {k: v for k, v in result["planned_bytes"].items() if isinstance(v, int | float)}
            rows.append((index, arm.name, parts, f"of {bytes_text(measured)} peak"))
    note = "weights, gradients and states as planned, activations aside, and the measured peak"
    return _stacked("Memory of training", note, rows)


def _stacked(title: str, note: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    largest = max(_total(parts) for _, _, parts, _ in rows) or 1
    # A counter or two would only have a place in the legend.
    least = largest / 1000
    found = {part for _, _, parts, _ in rows for part, size in parts.items() if size > least}
    found.discard("total")
    kinds = [part for part in _PARTS if part in found] + sorted(found - set(_PARTS))
    bars = []
    for index, name, parts, after in rows:
        shown = [(kind, parts[kind]) for kind in kinds if parts.get(kind)]
        words = ", ".join(f"{_word(kind)} {bytes_text(size)}" for kind, size in shown)
        spans = "".join(
            f'<span class="k-{_class(kind)}" style="width:{100 * size / largest:.3f}%" '
            f'title="{escape(_word(kind))}: {bytes_text(size)}"></span>'
            for kind, size in shown
        )
        tail = f" <small>{after}</small>" if after else ""
        bars.append(
            f'<div class="bar" data-arm="{index}"><b>{escape(name)}</b>'
            f'<div class="track" role="img" aria-label="{escape(words) or "nothing"}">{spans}</div>'
            f"<span>{bytes_text(_total(parts))}{tail}</span></div>"
        )
    keys = "".join(
        f'<span><i class="k-{_class(kind)}"></i>{escape(_word(kind))}</span>' for kind in kinds
    )
    return (
        f'<section class="card"><h2>{title}</h2><p class="note">{note}</p>'
        f'<div class="bars">{"".join(bars)}</div><div class="keys">{keys}</div></section>'
    )


def _total(parts: Mapping[str, float]) -> float:
    return parts.get("total", sum(parts.values()))


def _word(kind: str) -> str:
    return kind.replace("_", " ")


def _class(kind: str) -> str:
    return kind if kind in _PARTS else "other"


def clock_bars(report: Report) -> str:
    """Median step time of every arm, measured in turn."""
    clocks = report.clocks
    if not clocks:
        return ""
    longest = max(timed["high"] for timed in clocks.values()) or 1
    bars = []
    for index, arm in enumerate(report.arms):
        timed = clocks.get(arm.name)
        if timed is None:
            continue
        whole, own = timed["step_seconds"], timed["optimizer_seconds"]
        rest = whole - (own or 0)
        low, high = (100 * timed[name] / longest for name in ("low", "high"))
        spans = f'<span class="k-model" style="width:{100 * rest / longest:.3f}%"></span>'
        if own:
            spans += f'<span class="k-optimizer" style="width:{100 * own / longest:.3f}%"></span>'
        words = f"{whole * 1e3:.1f} ms, optimizer {(own or 0) * 1e3:.1f} ms"
        bars.append(
            f'<div class="bar" data-arm="{index}"><b>{escape(arm.name)}</b>'
            f'<div class="track" role="img" aria-label="{words}">{spans}'
            f'<em style="left:{low:.2f}%;width:{max(high - low, 0.4):.2f}%"></em></div>'
            f"<span>{whole * 1e3:,.1f} ms</span></div>"
        )
    rounds = max(r["clock"]["rounds"] for r in report.races.values() if r["clock"])
    return (
        '<section class="card"><h2>Time of a step</h2><p class="note">median of '
        f"{rounds} steps of all runs in turn; line: from the first to the third quartile</p>"
        f'<div class="bars">{"".join(bars)}</div><div class="keys">'
        '<span><i class="k-model"></i>forward and backward</span>'
        '<span><i class="k-optimizer"></i>optimizer</span></div></section>'
    )
