"""Tables that a click on a column head sorts: one row for each arm, and one for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from subspan.report.loading import Arm, Report
from subspan.report.parts import change, with_spread
from subspan.report.runs import Run
from subspan.report.series import settings_text
from subspan.report.words import bytes_text

Cell = tuple[str, object]
"""HTML and the value to sort by."""

_STATES = {
    "finished": "finished",
    "stopped": "not finished",
    "failed": "failed",
    "running": "running",
    "waiting": "waiting",
    "unreadable": "not readable",
}


def results(report: Report) -> str:
    """A row for each arm; those without a result say why."""
    columns = ["method", "validation loss", "perplexity", "change", "optimizer state"]
    columns += ["peak memory", "tokens / s", "seconds", "optimizer share"]
    if report.clocks:
        columns.append("ms / step in turn")
    if report.searched:
        columns.insert(1, "chosen")
    if report.seeded:
        columns.insert(1, "seeds")
    reference = next((arm for arm in report.arms if arm.mean), None)
    rows = []
    for index, arm in enumerate(report.arms):
        cells = [_name(arm, index)]
        if arm.mean is None or reference is None:
            reason = escape(arm.reason or "no result")
            tail = f'<td class="reason {arm.state}" colspan="{len(columns) - 1}">{reason}</td>'
        else:
            if report.seeded:
                cells.append((str(arm.seeds), arm.seeds))
            if report.searched:
                cells.append((escape(settings_text(arm.settings)) or "—", ""))
            cells += _numbers(arm, reference, report)
            tail = ""
        rows.append(_row(index, cells, tail))
    return _table("Results", "results", columns, rows)


def _name(arm: Arm, index: int) -> Cell:
    flag = ""
    if arm.mean is not None and arm.reason:
        flag = f' <span class="flag">{escape(arm.reason)}</span>'
    return _who(arm.name) + flag, arm.name


def _who(name: str) -> str:
    return f'<span class="who"><span class="key"></span><span>{escape(name)}</span></span>'


def _numbers(arm: Arm, reference: Arm, report: Report) -> list[Cell]:
    """What was measured of an arm with a result."""
    mean, base = arm.mean, reference.mean
    assert mean is not None and base is not None
    against = "" if arm is reference else change(mean["perplexity"], base["perplexity"])
    shares = [
        run.result["optimizer_seconds"] / run.result["seconds"]
        for run in arm.runs
        if run.result and run.result["seconds"]
    ]
    share = sum(shares) / len(shares) if shares else 0.0
    cells: list[Cell] = [
        (with_spread(arm, "validation_loss", "{:.4f}".format), mean["validation_loss"]),
        (with_spread(arm, "perplexity", "{:.2f}".format), mean["perplexity"]),
        (against or "—", mean["perplexity"] / base["perplexity"]),
        (bytes_text(mean["state_bytes"]), mean["state_bytes"]),
        (bytes_text(mean["peak_memory_bytes"]), mean["peak_memory_bytes"]),
        (with_spread(arm, "tokens_per_second", "{:,.0f}".format), mean["tokens_per_second"]),
        (with_spread(arm, "seconds", "{:,.1f}".format), mean["seconds"]),
        (f"{100 * share:.1f} %" if shares else "—", share if shares else ""),
    ]
    if report.clocks:
        timed = report.clocks.get(arm.name)
        value = timed["step_seconds"] * 1e3 if timed else ""
        cells.append((f"{value:,.1f}" if timed else "—", value))
    return cells


def runs(report: Report) -> str:
    """A row for each run of a comparison with search or seeds, and of any that has failed."""
    if not (report.searched or report.seeded):
        return ""
    indices = {arm.name: index for index, arm in enumerate(report.arms)}
    columns = ["run", "settings", "seed", "state", "steps", "validation loss", "why"]
    rows = []
    chosen = {(arm.name, run.trial) for arm in report.arms for run in arm.runs if run.trial}
    for run in sorted(report.runs, key=lambda run: _order(run, indices)):
        index = indices.get(run.arm or run.name, -1)
        best = report.searched and (run.arm, run.trial) in chosen
        rows.append(_row(index, _run_cells(run, best), "", run.state))
    return _table("All runs", "runs", columns, rows)


def _order(run: Run, indices: Mapping[str, int]) -> tuple[float, ...]:
    """By arm, then learning rate, then seed."""
    rate = run.settings.get("lr")
    number = float(rate) if isinstance(rate, int | float) else 0.0
    return indices.get(run.arm or run.name, -1), number, run.seed or 0


def _run_cells(run: Run, chosen: bool) -> list[Cell]:
    loss = f"{run.loss:.4f}" if run.loss is not None else "—"
    state = "pruned" if run.state == "stopped" and run.trial else _STATES[run.state]
    settings = escape(settings_text(run.settings)) or "—"
    return [
        (_who(run.arm or run.name), run.arm or run.name),
        (settings + (" <b>chosen</b>" if chosen else ""), run.settings.get("lr", "")),
        ("—" if run.seed is None else str(run.seed), "" if run.seed is None else run.seed),
        (f'<span class="state {run.state}">{state}</span>', state),
        (f"{run.steps:,}", run.steps),
        (loss, "" if run.loss is None else run.loss),
        (f'<span class="why">{escape(run.reason or "")}</span>', run.reason or ""),
    ]


def _row(index: int, cells: Sequence[Cell], tail: str = "", kind: str = "") -> str:
    row = "".join(f'<td data-value="{escape(str(value))}">{text}</td>' for text, value in cells)
    arm = f' data-arm="{index}" style="--c:var(--c{index % 8})"' if index >= 0 else ""
    return f"<tr{arm}{f' class={kind}' if kind else ''}>{row}{tail}</tr>"


def _table(title: str, name: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><button type="button">{c}</button></th>' for c in columns)
    return (
        f'<section class="card wide"><h2>{title}</h2><div class="scroll" tabindex="0" '
        f'role="region" aria-label="{title}, scrolls sideways"><table class="sortable" '
        f'id="{name}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</section>"
    )
