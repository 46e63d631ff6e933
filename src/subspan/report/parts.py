"""Sections of the page about results: heading, problems, cards, legend, places of the charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from subspan.report.heat import MEASURES
from subspan.report.loading import Arm, Report
from subspan.report.series import has_curves
from subspan.report.standings import how
from subspan.report.words import bytes_text, change_text, count_text, seconds_text

FEW = 6
"""Up to so many arms each have a card of their own."""


def lead(report: Report) -> str:
    """What was trained on what, whether the runs can be compared, and what could not be read."""
    done = [(run.config, run.result) for run in report.runs if run.result and run.config]
    parts = []
    if not done:
        parts.append('<p class="lead">No run is finished yet.</p>')
    else:
        config, result = done[0]
        corpus = config.data.corpus
        facts = [
            f"{config.model}, {count_text(result['inputs'].get('parameters', 0))} parameters",
            f"text: {corpus if isinstance(corpus, str) else ', '.join(corpus)}",
            f"{count_text(result['tokens'])} tokens in {result['steps']} steps"
            + (" each" if len(done) > 1 else ""),
        ]
        parts.append(f'<p class="lead">{escape(" · ".join(facts))}</p>')
    for results in report.races.values():
        parts.append(f'<p class="note">{escape(how(results))}</p>')
    if report.comparable is False:
        parts.append(
            '<p class="note warning">The runs differ in initial weights, text or order of data, so '
            "their losses cannot be compared.</p>"
        )
    elif report.comparable and len(report.arms) > 1:
        same = "" if report.races else "Same initial weights and text in every run. "
        first = next(arm.name for arm in report.arms if arm.mean)
        parts.append(f'<p class="note">{same}Changes are against {escape(first)}.</p>')
    return "".join(parts) + problems(report)


def problems(report: Report) -> str:
    """One line for everything that could not be read."""
    if not report.problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in report.problems)
    return (
        '<section class="card problems" aria-label="Problems"><h2>Not all could be read</h2>'
        f"<ul>{items}</ul></section>"
    )


def change(value: float, reference: float, *, steady: float = 0.0005) -> str:
    """The difference in percent, marked as better or worse."""
    kind = "better" if value < reference * (1 - steady) else "worse"
    if abs(value / reference - 1) < steady:
        kind = ""
    return f'<span class="change {kind}">{change_text(value, reference)}</span>'


def with_spread(arm: Arm, name: str, text: Callable[[float], str]) -> str:
    """Mean ± sample standard deviation."""
    assert arm.mean is not None
    spread = f' <span class="pm">± {text(arm.spread[name])}</span>' if arm.spread else ""
    return text(arm.mean[name]) + spread


def cards(report: Report) -> str:
    """Perplexity in large figures: a card for each arm, or the best of many."""
    done = [(index, arm) for index, arm in enumerate(report.arms) if arm.mean]
    if not done:
        return ""
    if len(done) == 1:
        return _tiles(done[0][1])
    if len(done) > FEW:
        return _best(done)
    reference = done[0][1].mean
    assert reference is not None
    found = []
    for index, arm in done:
        assert arm.mean is not None
        first = arm.mean is reference
        total, base = arm.mean["state_bytes"], reference["state_bytes"]
        share = "" if first or not base else f" {change(total, base)}"
        rows = {
            "optimizer state": bytes_text(total) + share,
            "tokens / s": f"{arm.mean['tokens_per_second']:,.0f}",
            "training time": seconds_text(arm.mean["seconds"]),
        }
        shown = "" if first else change(arm.mean["perplexity"], reference["perplexity"])
        found.append(
            f'<section class="card method" style="--c:var(--c{index % 8})" data-arm="{index}">'
            f"<h2><span>{escape(arm.name)}</span>{shown}</h2>"
            f'<p class="big">{with_spread(arm, "perplexity", "{:.2f}".format)}</p>'
            f'<p class="note">validation perplexity{_over(arm)}</p><dl>'
            + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
            + "</dl></section>"
        )
    return f'<div class="methods">{"".join(found)}</div>'


def _over(arm: Arm) -> str:
    return f", {arm.seeds} seeds" if arm.seeds > 1 else ""


def _tile(value: str, label: str, note: str = "") -> str:
    below = f'<p class="note">{note}</p>' if note else ""
    return f'<div class="card tile"><p class="big">{value}</p><p>{label}</p>{below}</div>'


def _tiles(arm: Arm) -> str:
    mean: Mapping[str, Any] = arm.mean or {}
    tiles = [
        _tile(with_spread(arm, "perplexity", "{:.2f}".format), "validation perplexity"),
        _tile(with_spread(arm, "validation_loss", "{:.3f}".format), "validation loss"),
        _tile(bytes_text(mean["state_bytes"]), "optimizer state"),
        _tile(bytes_text(mean["peak_memory_bytes"]), "peak memory"),
        _tile(f"{mean['tokens_per_second']:,.0f}", "tokens / s"),
        _tile(seconds_text(mean["seconds"]), "training time"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _best(done: list[tuple[int, Arm]]) -> str:
    """Who is first in what matters most, where there are too many arms for a card each."""

    def tile(name: str, label: str, text: Callable[[float], str], most: bool = False) -> str:
        values = {arm.name: arm.mean[name] for _, arm in done if arm.mean}
        best = (max if most else min)(values.values())
        who = [arm for arm, value in values.items() if value == best]
        note = who[0] if len(who) == 1 else f"{who[0]} and {len(who) - 1} more"
        return _tile(text(best), label, escape(note))

    return (
        '<div class="tiles">'
        + tile("perplexity", "lowest perplexity", "{:.2f}".format)
        + tile("state_bytes", "smallest optimizer state", bytes_text)
        + tile("peak_memory_bytes", "smallest peak memory", bytes_text)
        + tile("tokens_per_second", "most tokens / s", "{:,.0f}".format, most=True)
        + "</div>"
    )


def legend(report: Report) -> str:
    """Buttons that highlight an arm in all charts and tables."""
    if len(report.arms) < 2 or not has_curves(report):
        return ""
    tried = {trial.arm for trial in report.trials}
    buttons = "".join(
        f'<button type="button" data-arm="{index}" aria-pressed="false" '
        f'style="--c:var(--c{index % 8})"><span class="key"></span>{escape(arm.name)}</button>'
        for index, arm in enumerate(report.arms)
        if arm.mean or arm.name in tried or any(run.lines for run in arm.runs)
    )
    return f'<div class="legend" role="group" aria-label="Highlight a run">{buttons}</div>'


def chart(title: str, note: str, x: str) -> str:
    """The place of a chart that the script draws."""
    return (
        f'<section class="card"><h2>{title}</h2><p class="note">{note}</p>'
        f'<div class="chart" data-x="{x}" data-label="{title}"></div></section>'
    )


def charts(report: Report) -> list[str]:
    """Places of the loss curves and of what follows from them."""
    found = []
    if has_curves(report):
        lines = "thick: validation, thin: training"
        if report.seeded:
            lines += "; mean over seeds, band: one standard deviation"
        found += [
            chart("Loss against tokens", lines, "tokens"),
            chart(
                "Loss against time",
                "without evaluation and saving; a busy machine slows a run",
                "seconds",
            ),
        ]
    if len([arm for arm in report.arms if arm.mean]) > 1:
        found.append(chart("Loss against memory", "towards the lower left is better", "bytes"))
    if report.searched:
        note = "final loss of each trial; ring: chosen, hollow: pruned early, cross: failed"
        found.append(chart("Learning-rate sensitivity", note, "lr"))
    if report.seeded:
        note = "bar: mean and one standard deviation; circles: seeds"
        found.append(chart("Spread over seeds", note, "loss"))
    return found


def subspaces(heat: Mapping[str, Any] | None) -> str:
    """Places of the heatmaps."""
    if heat is None:
        return ""
    options = "".join(f"<option>{escape(run['name'])}</option>" for run in heat["runs"])
    choice = f'<label>Run <select autocomplete="off">{options}</select></label>'
    figures = "".join(
        f'<figure data-measure="{measure}"><figcaption><b>{heading}</b>'
        f'<span class="note">{note}</span></figcaption>'
        f'<div class="scale" aria-hidden="true"><span></span><i></i><span></span></div>'
        '<div class="map"><canvas role="img"></canvas></div>'
        f'<p class="note summary">{escape(heat["runs"][0]["notes"][measure])}</p></figure>'
        for measure, (heading, note, _) in MEASURES.items()
    )
    return (
        '<section class="card wide" id="heat"><div class="head"><h2>Subspaces by layer</h2>'
        f"{choice if len(heat['runs']) > 1 else ''}</div>"
        '<p class="note">a row for each layer, first layer on top, at the refreshes that were '
        f'recorded</p><div class="panels">{figures}</div></section>'
    )
