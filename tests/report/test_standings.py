"""The table of a comparison: numbers, failures, and a section that is replaced in place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from subspan.report.standings import failures, how, markdown, rows, standings, write_section
from subspan.train.race.results import VERSION, Results

MEAN = {
    "validation_loss": 3.0,
    "perplexity": 20.0,
    "state_bytes": 3e6,
    "peak_memory_bytes": 5e8,
    "seconds": 90.0,
    "tokens_per_second": 1234.0,
}


def arm(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"method": "m", "chosen": "c", "settings": settings, "seeds": 2, "failed": None}
    return base | {"mean": MEAN, "spread": dict.fromkeys(MEAN, 0.5)} | changes


def results(**changes: Any) -> Results:
    states = ["finished", "finished", "stopped", "failed"]
    base: Any = {
        "version": VERSION,
        "title": "A race",
        "same_inputs": True,
        "tokens": 4096,
        "search": {"sampler": "grid", "trials": 3, "rungs": [500, 1000], "keep": 0.5, "seed": 0},
        "seeds": [0, 1],
        "runs": [{"arm": "adamw", "state": state, "folder": "f"} for state in states],
        "arms": {
            "adamw": arm({"lr": 0.01}),
            "galore": arm(
                {"lr": 1e-05, "method_options.alpha": 0.25}, mean=MEAN | {"perplexity": 22.0}
            ),
            "fira": arm({}, mean=None, spread=None, chosen=None, failed="out of [memory]"),
        },
        "clock": {"rounds": 9, "arms": {"adamw": {"step_seconds": 0.0123}}, "machine": {}},
    }
    return base | changes


def test_rows_hold_what_was_measured() -> None:
    table = rows(results())
    assert table["adamw"] == {
        "validation perplexity": "20.00 ± 0.50",
        "change": "±0.0 %",
        "chosen": "lr 0.01",
        "optimizer state": "3 MB",
        "peak memory": "500 MB",
        "tokens/s": "1,234",
        "time": "1 min 30 s",
        "ms/step in turn": "12.3",
        "seeds": "2/2",
        "failed runs": "1/4",
    }
    assert table["galore"]["change"] == "+10.0 %"
    assert table["galore"]["chosen"] == "lr 1e-05, alpha 0.25"
    assert set(table["fira"].values()) == {"—", "2/2", "0/0"}
    simple = rows(results(seeds=[0], runs=[], clock=None, search=None))
    assert list(simple["adamw"])[-1] == "time"
    assert failures(results()) == ["fira: out of [memory]"]


def test_terminal_table_fits_eighty_columns() -> None:
    out = io.StringIO()
    long = results()
    long["arms"]["online_subspace_descent"] = long["arms"].pop("adamw")
    Console(file=out, width=80).print(standings(long))
    text = out.getvalue()
    assert "online_subspace_descent" in text
    assert "…" not in text
    assert "20.00 ± 0.50" in text
    assert "failed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_paragraph_says_how_the_arms_were_compared() -> None:
    text = how(results())
    for part in (
        "4,096 tokens each",
        "3 trials of every arm (grid) with seed 0",
        "After steps 500 and 1,000 the best 50 % went on",
        "over seeds 0, 1",
        "median of 9 steps",
    ):
        assert part in text
    assert "losses cannot be compared" in how(results(same_inputs=False))


def test_section_takes_the_place_of_the_one_with_its_heading(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section(page, "## A race\n\nfirst\n")
    assert page.read_text() == "## A race\n\nfirst\n"
    page.write_text("# Top\n\nintro\n\n## A race\n\nold\n\n### part\n\n## Next\n\nrest\n")
    write_section(page, "## A race\n\nsecond\n")
    assert page.read_text() == "# Top\n\nintro\n\n## A race\n\nsecond\n\n## Next\n\nrest\n"
    write_section(page, "## New\n\nlast\n")
    assert page.read_text().endswith("rest\n\n## New\n\nlast\n")


def test_markdown_is_one_table_with_heading_and_command(tmp_path: Path) -> None:
    empty = results(runs=[])
    text = markdown(empty, tmp_path, "subspan compare --config x.yaml")
    lines = text.splitlines()
    assert lines[:3] == ["## A race", "", "`subspan compare --config x.yaml`"]
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[0] for line in table[2:]] == ["| adamw", "| galore", "| fira"]
    assert lines[-1] == "Failed: fira: out of [memory]."
