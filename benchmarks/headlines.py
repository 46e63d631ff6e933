"""The papers' memory headlines, recomputed: docs/HEADLINES.md.

python -m benchmarks.headlines            write the page
python -m benchmarks.headlines --check    fail if the page is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.headline_claims import OPEN, claims
from benchmarks.headline_tables import PUBLISHED, SIZES, Table, states, totals, weights_and_states

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "HEADLINES.md"

_HEAD = """# Memory headlines, recomputed

Written by `python -m benchmarks.headlines`; do not edit. GB = 10^9 bytes, GiB = 2^30. Models: the
LLaMA sizes of the GaLore paper, vocabulary 32000, untied head. Embedding, head and norms keep full
Adam. Counts of registered methods come from the state that their recipes declare (the same numbers
as `subspan plan`); other methods are formulas on the shapes. 16-bit columns have two bytes per
element, 8-bit ones one byte and no scales. Baseline of every percentage: Adam with bfloat16 states
on the whole model.
"""


def _table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _agreement() -> str:
    """Whether the table of weights and states equals the literature's to the digits it gives."""
    missed = [
        f"{name} at {size.upper()}: {counted / 1e9:.3f} against {value}"
        for place, size in enumerate(SIZES)
        for name, counted in weights_and_states(size).items()
        for value in [PUBLISHED[name][place]]
        if abs(counted / 1e9 - value) > (0.0051 if value > 10 else 0.00051)
    ]
    if missed:
        return "Differs from the literature's table in: " + "; ".join(missed) + ".\n"
    return (
        "All 25 numbers equal the literature's (GaLore and SLTrain: their own memory columns, "
        "0.28, 0.61, 4.76 and 0.27, 0.60, 1.24, 4.16 GB).\n"
    )


def render() -> str:
    """The page."""
    found = claims()
    table = [[c.paper, c.claim, c.computed, c.verdict] for c in found]
    reproduced = sum("reproduces" in c.verdict for c in found)
    parts = [
        _HEAD,
        "## Optimizer states\n",
        _table(states()),
        "## Weights and states, GB, two bytes per element\n",
        _table(totals()),
        _agreement(),
        "## Claim by claim\n",
        f"{len(found)} claims are arithmetic; {reproduced} reproduce to the digit.\n",
        _table((["paper", "claim", "recomputed", "verdict"], table)),
        "## Not decided by shapes\n",
        "".join(f"- {paper}: {claim}\n" for paper, claim in OPEN.items()),
    ]
    return "\n".join(parts)


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headlines", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    text = render()
    if not options.check:
        DOCUMENT.write_text(text, encoding="utf-8")
        print(f"wrote {DOCUMENT.name}", file=sys.stderr)
    elif not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{DOCUMENT.name} is out of date: run python -m benchmarks.headlines")


if __name__ == "__main__":
    main()
