"""Sections of the report about results: heading, cards, charts, bars, table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subspan.report.runs import Run
from subspan.report.words import bytes_text, change_text, count_text, seconds_text
from subspan.train.comparison import same_inputs

Colours = Mapping[str, str]


def finished(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Any]]]:
    """Finished runs with their results."""
    return [(run, run.result) for run in runs if run.result is not None]


def lead(runs: Sequence[Run]) -> str:
    """What was trained on what, and whether the runs can be compared."""
    done = finished(runs)
    if not done or done[0][0].config is None:
        return '<p class="lead">No run is finished yet.</p>'
    config, result = done[0][0].config, done[0][1]
    inputs = result["inputs"]
    corpus = config.data.corpus
    facts = [
        f"{config.model}, {count_text(inputs['parameters'])} parameters",
        f"text: {corpus if isinstance(corpus, str) else ', '.join(corpus)}",
        f"{count_text(result['tokens'])} tokens in {result['steps']} steps"
        + (" each" if len(done) > 1 else ""),
    ]
    parts = [f'<p class="lead">{escape(" · ".join(facts))}</p>']
    if len(done) > 1:
        if same_inputs([each for _, each in done]):
            first = escape(done[0][0].name)
            parts.append(
                '<p class="note">Same initial weights and text in every run. '
                f"Changes are against {first}.</p>"
            )
        else:
            parts.append(
                '<p class="note warning">The runs differ in initial weights or text, so their '
                "losses cannot be compared.</p>"
            )
    return "".join(parts)


def _change(value: float, reference: float, *, steady: float = 0.0005) -> str:
    kind = "better" if value < reference * (1 - steady) else "worse"
    if abs(value / reference - 1) < steady:
        kind = ""
    return f'<span class="change {kind}">{change_text(value, reference)}</span>'


def method_cards(runs: Sequence[Run], colours: Colours) -> str:
    """One card for each finished run: perplexity in large figures, then what it cost."""
    done = finished(runs)
    cards = []
    for run, result in done:
        first, reference = run is done[0][0], done[0][1]
        total, base = result["state_bytes"]["total"], reference["state_bytes"]["total"]
        change = "" if first else _change(result["perplexity"], reference["perplexity"])
        share = "" if first or not base else f" {_change(total, base)}"
        rows = {
            "optimizer state": bytes_text(total) + share,
            "tokens / s": f"{result['tokens_per_second']:,.0f}",
            "training time": seconds_text(result["seconds"]),
        }
        cards.append(
            f'<section class="card method" style="--c:{colours[run.name]}">'
            f"<h2><span>{escape(run.name)}</span>{change}</h2>"
            f'<p class="big">{result["perplexity"]:.2f}</p>'
            '<p class="note">validation perplexity</p><dl>'
            + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
            + "</dl></section>"
        )
    return f'<div class="methods">{"".join(cards)}</div>' if cards else ""


def _chart(title: str, note: str, x: str) -> str:
    return (
        f'<section class="card"><h2>{title}</h2><p class="note">{note}</p>'
        f'<div class="chart" data-x="{x}" data-label="{title}"></div></section>'
    )


def charts(runs: Sequence[Run], colours: Colours) -> str:
    """Places of the curves, which the script draws, and the bars of state bytes."""
    if not any("validation_loss" in line for run in runs for line in run.lines):
        return ""
    thin = "thick: validation, thin: training"
    parts = [
        _chart("Loss against tokens", thin, "tokens"),
        _chart(
            "Loss against time",
            "without evaluation and saving; a busy machine slows a run",
            "seconds",
        ),
    ]
    if finished(runs):
        parts += [
            _chart("Loss against memory", "towards the lower left is better", "bytes"),
            state_bars(runs, colours),
        ]
    return f'<div class="charts">{"".join(parts)}</div>'


def state_bars(runs: Sequence[Run], colours: Colours) -> str:
    """Optimizer state of every finished run as a bar, divided by kind."""
    done = finished(runs)
    kinds = list(dict.fromkeys(k for _, result in done for k in result["state_bytes"]))
    kinds.remove("total")
    kinds = [k for k in kinds if any(result["state_bytes"].get(k) for _, result in done)]
    shade = {kind: 1 - 0.75 * i / max(1, len(kinds) - 1) for i, kind in enumerate(kinds)}
    largest = max(result["state_bytes"]["total"] for _, result in done) or 1
    rows = []
    for run, result in done:
        counted = result["state_bytes"]
        spans = "".join(
            f'<span style="width:{100 * counted[kind] / largest:.3f}%;opacity:{shade[kind]:.2f}" '
            f'title="{escape(kind)}: {bytes_text(counted[kind])}"></span>'
            for kind in kinds
            if counted.get(kind)
        )
        rows.append(
            f'<div class="bar" style="--c:{colours[run.name]}"><div class="label">'
            f"<b>{escape(run.name)}</b><span>{bytes_text(counted['total'])}</span></div>"
            f'<div class="track">{spans}</div></div>'
        )
    keys = "".join(
        f'<span style="--o:{shade[kind]:.2f}">{escape(kind.replace("_", " "))}</span>'
        for kind in kinds
    )
    return (
        '<section class="card"><h2>Optimizer state</h2>'
        '<p class="note">bytes of the tensors that live between two steps</p>'
        f'<div class="bars">{"".join(rows)}</div><div class="keys">{keys}</div></section>'
    )


def results(runs: Sequence[Run], colours: Colours) -> str:
    """The table that a click on a column head sorts."""
    done = finished(runs)
    reference = done[0][1] if done else None
    columns = [
        *("method", "validation loss", "perplexity", "change", "optimizer state"),
        *("peak memory", "tokens / s", "seconds", "optimizer share"),
    ]
    head = "".join(f'<th scope="col"><button type="button">{c}</button></th>' for c in columns)
    rows = []
    for run in runs:
        name = f'<span class="dot"></span>{escape(run.name)}'
        cells = [(name, run.name)]
        if run.result is None or reference is None:
            reason = escape(run.reason or "no result")
            tail = f'<td class="reason" colspan="{len(columns) - 1}">{reason}</td>'
        else:
            cells += _numbers(run.result, reference)
            tail = ""
        row = "".join(f'<td data-value="{escape(str(v))}">{text}</td>' for text, v in cells)
        rows.append(f'<tr style="--c:{colours[run.name]}">{row}{tail}</tr>')
    return (
        '<section class="card wide"><h2>Results</h2><div class="scroll"><table id="results">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _numbers(result: dict[str, Any], reference: dict[str, Any]) -> list[tuple[str, Any]]:
    """Text and sorting value of each cell after the name."""
    loss, perplexity = result["validation_loss"], result["perplexity"]
    state, peak = result["state_bytes"]["total"], result["peak_memory_bytes"]["process"]
    speed, seconds = result["tokens_per_second"], result["seconds"]
    share = result["optimizer_seconds"] / seconds if seconds else 0.0
    change = "" if result is reference else _change(perplexity, reference["perplexity"])
    return [
        (f"{loss:.4f}", loss),
        (f"{perplexity:.2f}", perplexity),
        (change or "—", perplexity / reference["perplexity"]),
        (bytes_text(state), state),
        (bytes_text(peak), peak),
        (f"{speed:,.0f}", speed),
        (f"{seconds:,.1f}", seconds),
        (f"{share:.1%}".replace("%", " %"), share),
    ]
