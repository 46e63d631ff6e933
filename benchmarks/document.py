"""Renders measured numbers as Markdown, between the markers in docs/BENCHMARKS.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.bars import bars
from benchmarks.machine import FOLDER_VARIABLE
from benchmarks.shapes import SHAPES, Shape

BEGIN = "<!-- measured: begin (written by `make bench`) -->"
END = "<!-- measured: end -->"

Numbers = dict[str, Any]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ms(value: float) -> str:
    return f"{1e3 * value:.0f}" if value >= 0.1 else f"{1e3 * value:.1f}"


def _ms_spread(values: Numbers | None) -> str:
    if values is None:
        return ""
    if values["min"] == values["max"]:  # measured once
        return _ms(values["median"])
    return f"{_ms(values['median'])} [{_ms(values['min'])}-{_ms(values['max'])}]"


def _ratio(values: Numbers | None) -> str:
    if values is None:
        return ""
    if values["min"] == values["max"]:
        return f"**{values['median']:.2f}**"
    return f"**{values['median']:.2f}** [{values['min']:.2f}-{values['max']:.2f}]"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def _label(row: Numbers) -> str:
    text = f"{row['package']} {row['name']}"
    return f"**{text}**" if row["package"] == "subspan" else text


def _unique(rows: list[Numbers]) -> list[Numbers]:
    """Rows of absolute numbers; torch's fused AdamW runs in every family but is listed once."""
    seen: dict[str, Numbers] = {}
    for row in rows:
        seen.setdefault(f"{row['package']} {row['name']}", row)
    return list(seen.values())


def _notes(rows: list[Numbers]) -> dict[str, int]:
    """What rows have to be read with, numbered in the order of the table."""
    texts = dict.fromkeys(row["note"] for row in rows if row["note"])
    return {text: number for number, text in enumerate(texts, 1)}


def _step_table(rows: list[Numbers]) -> str:
    header = ["optimizer", "normal step, CPU ms", "wall ms", "refresh step, CPU ms"]
    header += ["amortised, gap 200", "/ fused AdamW", "floor ms", "/ floor"]
    body = []
    listed = _unique(rows)
    notes = _notes(listed)
    over_adamw = {
        (row["family"], ours): kinds["amortised"]
        for row in rows
        if row["reference"]
        for ours, kinds in row.get("ours_over_this", {}).items()
    }
    for row in listed:
        label = _label(row) + (f" <sup>{notes[row['note']]}</sup>" if row["note"] else "")
        if row["error"]:
            body.append([label, row["error"], *[""] * 6])
            continue
        floor, wall = row["floor"], row["normal"]["wall"]
        mine = (row["family"], row["name"] if row["package"] == "subspan" else "")
        body.append(
            [
                label,
                _ms_spread(row["normal"]["cpu"]),
                _ms(wall["median"]) if wall else "",
                _ms_spread(row["refresh"]["cpu"]),
                _ms(row["amortised"]) if "amortised" in row else "",
                _ratio(over_adamw.get(mine)),
                _ms(floor["products"] + floor["memory"]),
                _ratio(floor["amortised"]),
            ]
        )
    return (
        _table(header, body)
        + "".join(f"\n<sup>{number}</sup> {text}.  " for text, number in notes.items())
        + ("\n" if notes else "")
    )


def _ratio_table(rows: list[Numbers]) -> str:
    body = []
    for row in rows:
        for ours, kinds in row.get("ours_over_this", {}).items():
            if kinds["normal"] is None or row["reference"]:
                continue
            peer = f"{row['package']} {row['name']}"
            ratios = [_ratio(kinds[kind]) for kind in ("normal", "refresh", "amortised")]
            body.append([f"subspan {ours}", peer, *ratios])
    header = ["ours", "divided by", "normal step", "refresh step", "amortised, gap 200"]
    return _table(header, body)


def _memory_table(rows: list[Numbers]) -> str:
    header = ["optimizer", "state, logical", "state, retained", "all that the optimizer holds"]
    header += ["peak extra, normal", "peak extra, refresh", "RSS peak, normal", "RSS peak, refresh"]
    body = []
    for row in _unique(rows):
        if row["error"]:
            continue
        peaks = row["peaks"]
        normal, refresh = peaks.get("normal", {}), peaks.get("refresh", {})
        body.append(
            [
                _label(row),
                _mib(row["state"]["logical"]),
                _mib(row["state"]["retained"]),
                _mib(row["held"]["retained"]),
                *(_mib(p.get(k)) for k in ("allocated", "resident") for p in (normal, refresh)),
            ]
        )
    return _table(header, body)


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def _rates_text(rates: list[Numbers]) -> str:
    """Medians of what was measured between the steps of all families."""
    products: dict[str, list[Numbers]] = {}
    squares: dict[int, list[float]] = {}
    transforms: dict[str, list[float]] = {}
    for family in rates:
        for p in family["products"]:
            products.setdefault(f"{p['m']}x{p['n']}, rank {p['rank']}", []).append(p)
        for square in family["squares"]:
            squares.setdefault(square["side"], []).append(square["rate"])
        for t in family["transforms"]:
            transforms.setdefault(f"{t['m']}x{t['n']}", []).append(t["seconds"])
    giga = 1e9
    parts = [f"{_median(family['bandwidth'] for family in rates) / giga:.1f} GB/s"]
    for name, seen in products.items():
        project, lift = (_median(p[kind] for p in seen) / giga for kind in ("project", "lift"))
        parts.append(f"{name}: project {project:.0f}, lift {lift:.0f} GFLOP/s")
    for side, found in sorted(squares.items()):
        parts.append(f"{side}x{side} products: {_median(found) / giga:.0f} GFLOP/s")
    for name, found in transforms.items():
        parts.append(f"cosine transform of {name}: {_ms(_median(found))} ms")
    return "Rates, medians: " + "; ".join(parts) + ".\n"


def _floor_table(results: Numbers, shape: Shape) -> str:
    """Unavoidable work of each method."""
    body = []
    for row in results["rows"]:
        floor = row.get("floor")
        if row["shape"] != shape.name or row["package"] != "subspan" or not floor:
            continue
        body.append(
            [
                row["name"],
                f"{floor['flops'] / 1e9:.2f}",
                f"{floor['bytes'] / 1e9:.3f}",
                f"{_ms(floor['products'])} + {_ms(floor['memory'])}",
            ]
        )
    header = ["method", "GFLOP", "GB", "floor ms, products + memory"]
    return _rates_text(results["rates"][shape.name]) + "\n" + _table(header, body)


def _shape_section(results: Numbers, shape: Shape) -> str:
    rows = [row for row in results["rows"] if row["shape"] == shape.name]
    projected, plain = shape.elements()
    largest = max([m * n for m, n in shape.projected()]) * 4 / 2**20
    return "\n".join(
        [
            f"## LLaMA {shape.name.upper()}, rank {shape.rank}\n",
            f"{(projected + plain) / 1e6:.2f} M parameters, {projected / 1e6:.2f} M of them in "
            f"{len(shape.projected())} projected matrices.\n",
            "### Step time\n",
            _step_table(rows),
            "### Ratios (ours / theirs, CPU time, median [min-max] of per-round ratios)\n",
            _ratio_table(rows),
            _staggered_text(results, shape),
            "### Memory, MiB\n",
            f"The largest projected matrix has {largest:.2f} MiB, the embedding "
            f"{shape.vocab * shape.hidden * 4 / 2**20:.2f} MiB.\n",
            _memory_table(rows),
            "### Floor\n",
            _floor_table(results, shape),
        ]
    )


def _quality_section(quality: Numbers) -> str:
    header = [
        "gradients",
        "rank",
        "share of all energy in the exact basis",
        "basis",
        "energy / exact, median",
    ]
    header += ["worst", "CPU ms per basis"]
    body = [
        [
            row["gradients"],
            str(row["rank"]),
            f"{row['exact_min']:.3f}-{row['exact_max']:.3f}",
            row["finder"],
            f"{row['median']:.5f}",
            f"{row['min']:.5f}",
            _ms(row["seconds"]),
        ]
        for row in quality["rows"]
    ]
    return f"## Energy that a basis captures\n\n{quality['setting']}\n\n" + _table(header, body)


def _bars_section(results: Numbers) -> str:
    marks = {True: "yes", False: "**no**"}
    found = bars(results)
    if not found:
        return ""
    body = [[bar.what, bar.limit, bar.measured, marks[bar.held]] for bar in found]
    table = _table(["what", "bar", "measured", "held"], body)
    held = sum(bar.held for bar in found)
    text = f"{held} of {len(found)} are held; those missed by the largest factor come first."
    return f"## The project's own bars, 60M\n\n{text}\n\n{table}"


def _staggered_text(results: Numbers, shape: Shape) -> str:
    parts = [
        f"GaLore with staggered refresh, gap {row['gap']}, CPU ms per step over one gap: "
        f"{_ms_spread(row)}.\n"
        for row in results["staggered"]
        if row["shape"] == shape.name
    ]
    return "".join(parts)


def render(results: Numbers) -> str:
    """The measured part of docs/BENCHMARKS.md."""
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    packages = {row["package"] for row in results["rows"]}
    cloned = ", ".join(at for name, at in machine["official"].items() if name in packages)
    head = [
        f"Date: {machine['date']}. Command: `{machine['command']}` ({results['seconds']:.0f} s).",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; one thread, "
        f"malloc settings: {machine['malloc']}; load average before the run "
        f"{machine['load']:.1f}.",
        f"Versions: {versions}.",
        f"Authors' code: {cloned or 'none'} (cloned from GitHub at these commits into the folder "
        f"that `{FOLDER_VARIABLE}` names).",
    ]
    sections = ["\n".join(head) + "\n", _bars_section(results)]
    sections += [_shape_section(results, SHAPES[name]) for name in results["rates"]]
    if "refresh" in results:
        sections.append(_quality_section(results["refresh"]))
    return "\n".join(sections)


def check_markers(path: Path) -> None:
    """End with one line if there is nowhere to write to."""
    text = path.read_text() if path.is_file() else ""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path.name} lacks the marker lines '{BEGIN}' and '{END}'")


def update_document(path: Path, results: Numbers) -> None:
    """Replace what stands between the markers."""
    check_markers(path)
    text = path.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}")
