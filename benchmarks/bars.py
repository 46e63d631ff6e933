"""The project's own bars, each with what was measured for it."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.shapes import SHAPES, Shape

Numbers = dict[str, Any]


class Bar(NamedTuple):
    """What was measured, the bar, the measured value, and their ratio: held if at most one."""

    what: str
    limit: str
    measured: str
    excess: float

    @property
    def held(self) -> bool:
        return self.excess <= 1.0


_FP32 = 4
# The first methods, which have bars for their normal steps as well.
_NORMAL = ("GaLore", "Fira", "APOLLO", "APOLLO stored basis")


def expected_state_bytes(name: str, shape: Shape) -> int | None:
    """Two moments for what is plain, two low-rank moments and a basis for what is projected."""
    projected, plain = shape.elements()
    if name == "AdamW":
        return _FP32 * 2 * (projected + plain)
    if name == "GaLore":
        coordinates, basis = shape.low_rank_elements(shape.rank)
        return _FP32 * (2 * plain + 2 * coordinates + basis)
    return None


def _at_most(what: str, limit: float, value: float) -> Bar:
    return Bar(what, f"at most {limit:g}x", f"{value:.2f}x", value / limit)


def _time_bars(rows: list[Numbers]) -> list[Bar]:
    """Each of our rows against every official implementation of the same, and its floor."""
    bars = []
    for row in rows:
        for ours, kinds in row.get("ours_over_this", {}).items():
            if not row["official"] or kinds["amortised"] is None:
                continue
            against = f"{ours} over {row['package']}"
            if row["name"] != ours:
                against += f" {row['name']}"
            if ours in _NORMAL:
                bars.append(_at_most(f"normal step, {against}", 0.5, kinds["normal"]["median"]))
            if ours == "GaLore" and kinds["refresh"] is not None:
                bars.append(_at_most(f"refresh step, {against}", 0.2, kinds["refresh"]["median"]))
            bar = _at_most(f"amortised step, {against}", 0.5, kinds["amortised"]["median"])
            alone = 1 / row["floor"]["amortised"]["median"]
            if alone > 0.5:  # no fp32 code can hold it
                bar = bar._replace(measured=f"{bar.measured}; the floor alone {alone:.2f}x")
            bars.append(bar)
    for row in rows:
        floor = row.get("floor")
        if row["package"] != "subspan" or not floor or floor["amortised"] is None:
            continue
        if row["name"] in _NORMAL:
            what = f"normal step, {row['name']} over its floor"
            bars.append(_at_most(what, 1.3, floor["distance"]["median"]))
        what = f"amortised step, {row['name']} over its floor"
        bars.append(_at_most(what, 1.5, floor["amortised"]["median"]))
    return bars


def _memory_bars(rows: list[Numbers], shape: Shape) -> list[Bar]:
    bars = []
    largest = _FP32 * max(m * n for m, n in shape.projected())
    for row in rows:
        if row["package"] != "subspan" or row["error"]:
            continue
        expected = expected_state_bytes(row["name"], shape)
        if expected is not None:
            logical, retained = row["state"]["logical"], row["state"]["retained"]
            found = f"{logical} logical, {retained} retained"
            # Fewer bytes than the method needs are as wrong as more.
            excess = max(max(x, expected) / min(x, expected) for x in (logical, retained))
            bars.append(Bar(f"state bytes, {row['name']}", f"exactly {expected}", found, excess))
        peaks = [peak["allocated"] for peak in row["peaks"].values() if "allocated" in peak]
        if peaks:
            what = f"peak extra over the largest projected matrix, {row['name']}"
            bars.append(_at_most(what, 3, max(peaks) / largest))
    return bars


def bars(results: Numbers) -> list[Bar]:
    """Every bar that these results can speak to, for the 60M shape, the most missed first."""
    shape = SHAPES["60m"]
    rows = [row for row in results["rows"] if row["shape"] == shape.name]
    found = _time_bars(rows) + _memory_bars(rows, shape)
    for row in results.get("staggered", []):
        if row["shape"] == shape.name:
            what = f"staggered refresh, slowest step over the median, gap {row['gap']}"
            found.append(_at_most(what, 2, row["max"] / row["median"]))
    lowest = [
        r["min"]
        for r in results.get("refresh", {}).get("rows", [])
        if r["finder"].startswith("subspan default") and r["gradients"] == "real"
    ]
    if lowest:
        what = "energy of the default basis over the exact one, real gradients, lowest of all"
        found.append(Bar(what, "at least 0.995", f"{min(lowest):.5f}", 0.995 / min(lowest)))
    return sorted(found, key=lambda bar: -bar.excess)
