"""Renders measured numbers as Markdown, between the markers in docs/BENCHMARKS.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.bars import bars
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
    return f"{_ms(values['median'])} [{_ms(values['min'])}-{_ms(values['max'])}]"


def _ratio(values: Numbers | None) -> str:
    if values is None:
        return ""
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


def _step_table(rows: list[Numbers]) -> str:
    header = ["optimizer", "normal step, CPU ms", "wall ms", "refresh step, CPU ms"]
    header += ["amortised, gap 200", "floor ms", "x floor"]
    body = []
    for row in _unique(rows):
        if row["error"]:
            body.append([_label(row), row["error"], *[""] * 5])
            continue
        floor = row.get("floor")
        wall = row["normal"]["wall"]
        body.append(
            [
                _label(row),
                _ms_spread(row["normal"]["cpu"]),
                _ms(wall["median"]) if wall else "",
                _ms_spread(row["refresh"]["cpu"]),
                _ms(row["amortised"]) if "amortised" in row else "",
                _ms(floor["products"] + floor["memory"]) if floor else "",
                _ratio(floor["distance"]) if floor else "",
            ]
        )
    return _table(header, body)


def _ratio_table(rows: list[Numbers]) -> str:
    body = []
    for row in rows:
        for ours, kinds in row.get("ours_over_this", {}).items():
            if kinds["normal"] is None:
                continue
            peer = f"{row['package']} {row['name']}"
            body.append(
                [f"subspan {ours}", peer, _ratio(kinds["normal"]), _ratio(kinds["refresh"])]
            )
    header = ["ours", "divided by", "normal step", "refresh step"]
    return _table(header, sorted(body, key=lambda line: line[0]))


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


def _floor_table(results: Numbers, shape: Shape) -> str:
    """Unavoidable work of each method and the rates that were measured between its steps."""
    ours = {
        row["family"]: row
        for row in results["rows"]
        if row["shape"] == shape.name and row["package"] == "subspan" and row.get("floor")
    }
    body = []
    for rates in results["rates"][shape.name]:
        row = ours.get(rates["family"])
        if row is None:
            continue
        floor = row["floor"]
        products = "; ".join(
            f"{p['m']}x{p['n']}: {p['project'] / 1e9:.0f}, {p['lift'] / 1e9:.0f}"
            for p in rates["products"]
        )
        body.append(
            [
                row["name"],
                f"{floor['flops'] / 1e9:.2f}",
                f"{floor['bytes'] / 1e9:.3f}",
                products,
                f"{rates['bandwidth'] / 1e9:.1f}",
                f"{_ms(floor['products'])} + {_ms(floor['memory'])}",
            ]
        )
    header = ["method", "GFLOP", "GB", "project, lift GFLOP/s", "GB/s", "floor ms"]
    return _table(header, body)


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
    body = [[what, bar, found, marks[held]] for what, bar, found, held in bars(results)]
    if not body:
        return ""
    return "## The project's own bars, 60M\n\n" + _table(["what", "bar", "measured", "held"], body)


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
    head = [
        f"Date: {machine['date']}. Command: `{machine['command']}` ({results['seconds']:.0f} s).",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; one thread, "
        f"malloc settings: {machine['malloc']}; load average before the run "
        f"{machine['load']:.1f}.",
        f"Versions: {versions}.",
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
