"""`python -m benchmarks [--write]`: measure, store the numbers as JSON, and render them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.document import check_markers, update_document

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "BENCHMARKS.md"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(shapes: list[str], asked: list[str], quality: bool) -> dict[str, Any]:
    """Run everything that was asked for and return what goes into the JSON file."""
    import torch

    from benchmarks.families import EARLIER, families
    from benchmarks.machine import describe
    from benchmarks.optimizer_step import QUICK, THOROUGH, measure_family, measure_staggered
    from benchmarks.rates import Machine
    from benchmarks.shapes import SHAPES, Model

    torch.set_num_threads(1)
    start = time.perf_counter()
    results: dict[str, Any] = {"machine": describe(), "rows": [], "rates": {}, "staggered": []}
    if quality:
        from benchmarks.refresh_quality import measure_quality

        results["refresh"] = measure_quality(SHAPES["10m"], SHAPES["60m"], _progress)
        torch.set_num_threads(1)
    machine = Machine()
    for name in shapes:
        shape, rates = SHAPES[name], []
        model = Model(shape)
        for family, members in families().items():
            large, earlier = name == "60m", family in EARLIER
            if family not in asked if asked else not (large or earlier):
                continue
            schedule = THOROUGH if large and earlier else QUICK
            rows, seen = measure_family(members, model, shape, machine, _progress, schedule)
            results["rows"] += rows
            rates.append(seen)
        if not asked or "galore" in asked:
            results["staggered"].append(measure_staggered(model, shape))
        results["rates"][name] = rates
    results["seconds"] = time.perf_counter() - start
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["60m", "10m"], choices=["60m", "10m"])
    parser.add_argument("--families", nargs="+", default=[], help="only these (default: all)")
    parser.add_argument("--skip-quality", action="store_true", help="leave out real gradients")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/results.json"))
    parser.add_argument("--write", action="store_true", help=f"update {DOCUMENT.name}")
    parser.add_argument("--render", action="store_true", help="render --json, measure nothing")
    options = parser.parse_args()
    if options.write:
        check_markers(DOCUMENT)  # before minutes of measuring, not after
    if options.render:
        results = json.loads(options.json.read_text())
    else:
        results = measure(options.shapes, options.families, not options.skip_quality)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        _progress(f"{results['seconds']:.0f} s; numbers in {options.json}")
    if options.write:
        update_document(DOCUMENT, results)
        _progress(f"wrote {DOCUMENT.name}")


if __name__ == "__main__":
    main()
