"""Plans, searches and comparisons as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from subspan.optim import lookup
from subspan.plan.budget import COUNTING, gigabytes, reduction
from subspan.plan.command import train_command
from subspan.plan.measure import Comparison
from subspan.plan.result import BASELINE, STATES, Plan
from subspan.plan.search import Outcome
from subspan.plan.settings import Settings

NAMES = {
    "weights": "weights",
    "buffers": "buffers",
    "gradients": "gradients",
    "first_moment": "first moments",
    "second_moment": "second moments",
    "basis": "bases (projectors)",
    "error": "error buffers",
    "scalar": "scalars",
    "activations": "activations",
    "temporary": "optimizer step, for a moment",
    "peak": "peak",
}


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    return table


def heading(plan: Plan) -> str:
    """Model and way of training, in words."""
    settings, model = plan.settings, plan.settings.model
    words = [
        f"{plan.label}: {plan.parameters / 1e6:,.2f} M parameters",
        f"{plan.trained / 1e6:,.2f} M trained",
        model.dtype,
        f"{settings.batch_size} x {model.sequence_length} tokens per pass",
    ]
    words += [f"{settings.accumulation} passes per step"] if settings.accumulation > 1 else []
    words += [f"attention {model.attention}"] if model.attention != "auto" else []
    words += ["activations recomputed"] if settings.checkpointing == "full" else []
    words += ["int8 weights"] if model.int8_weights else []
    if settings.update_in_backward:
        words.append(f"update in backward (clip {settings.clip:g}, {settings.clipping})")
    words += [f"adapter {model.adapter}"] if model.adapter else []
    words += [f"base weights {model.base_weights}"] if model.base_weights != "none" else []
    words += [f"one of {settings.ranks} devices (FSDP2)"] if settings.ranks > 1 else []
    return ", ".join(words)


def method_words(settings: Settings) -> str:
    """ "galore (rank 1024, storage int8)"."""
    shown = [f"{name} {value}" for name, value in settings.options.items()]
    rank = lookup(settings.method).defaults.get("rank")
    if rank is not None and "rank" not in settings.options:
        shown.insert(0, f"rank {rank}")
    return f"{settings.method} ({', '.join(shown)})" if shown else settings.method


def counting(plan: Plan) -> RenderableType:
    """The counting rule and the baseline of every percentage."""
    return Text(
        f"Counting: {COUNTING}.\nBaseline: {BASELINE}: states "
        f"{gigabytes(plan.baseline_state)}, weights + gradients + states "
        f"{gigabytes(plan.baseline_held)}.",
        style="dim",
    )


def one_plan(plan: Plan) -> RenderableType:
    """Every part of one plan."""
    table = _table("part", "GB (GiB)", "", left=1)
    table.columns[2].justify = "left"
    rows: list[tuple[str, int | None, str]] = [("weights", plan.weights, "exact")]
    rows += [("buffers", plan.buffers, "exact")] if plan.buffers > 1e6 else []
    once = plan.settings.updates_at_once
    rows.append(("gradients", plan.gradients, f"exact{', the largest one' if once else ''}"))
    for kind in STATES:
        if kind in plan.states:
            rows.append((kind, plan.states[kind], "exact"))
    rows.append(("activations", plan.activations, "estimate, kept when the forward pass ends"))
    rows.append(("temporary", plan.temporary, "estimate, at most"))
    for name, size, note in rows:
        table.add_row(NAMES[name], "not known" if size is None else gigabytes(size), note)
    if plan.peak is not None:
        where = "forward and backward pass" if plan.peak.moment == "backward" else "optimizer step"
        table.add_row(
            Text("peak", style="bold"), Text(gigabytes(plan.peak.total), style="bold"),
            f"estimate, in the {where}",
        )  # fmt: skip
    lines = [
        Text(heading(plan)),
        Text(f"method: {method_words(plan.settings)}\n"),
        table,
        Text(),
        counting(plan),
        Text(
            f"Against it: states {reduction(plan.state, plan.baseline_state)}, weights + gradients "
            f"+ states {reduction(plan.held, plan.baseline_held)}."
        ),
    ]
    return Group(*lines, _notes(plan.notes))


def many_plans(plans: Sequence[Plan], failed: Mapping[str, str]) -> RenderableType:
    """One row per method, the smallest peak first; then those that cannot be planned."""
    table = _table(
        "method", "weights", "gradients", "states", "bases", "activations", "peak", "states",
        "w + g + s",
    )  # fmt: skip
    for plan in sorted(plans, key=lambda plan: plan.needed):
        activations = "?" if plan.activations is None else f"{plan.activations / 1e9:.2f}"
        peak = "?" if plan.peak is None else f"{plan.peak.total / 1e9:.2f}"
        table.add_row(
            method_words(plan.settings),
            f"{plan.weights / 1e9:.2f}",
            f"{plan.gradients / 1e9:.2f}",
            f"{plan.state / 1e9:.2f}",
            f"{plan.states.get('basis', 0) / 1e9:.2f}",
            activations,
            peak,
            reduction(plan.state, plan.baseline_state),
            reduction(plan.held, plan.baseline_held),
        )
    lines: list[RenderableType] = [_failures(failed)] if failed else []
    if plans:
        rule = Text(
            "GB; the last two columns against the baseline; activations and peak: estimates"
        )
        lines = [Text(heading(plans[0]) + "\n"), table, Text(), rule, counting(plans[0]), *lines]
        common = set.intersection(*(set(plan.notes) for plan in plans))
        lines.append(_notes([note for note in plans[0].notes if note in common]))
    return Group(*lines)


def found(outcome: Outcome) -> RenderableType:
    """The winner with its command, and one line on why each other method is not."""
    lines: list[RenderableType] = []
    best = outcome.best
    if best is not None and best.way is not None and best.plan is not None:
        command, remarks = train_command(best.way.settings)
        lines += [one_plan(best.plan), Text()]
        made = "; ".join(best.way.compromises) or "none"
        lines.append(Text(f"Best of what fits into {gigabytes(outcome.budget)} GB: ", style="bold"))
        lines.append(Text(f"{method_words(best.way.settings)}; compromises: {made}\n"))
        lines.append(Text(f"{command}\n", style="bold"))
        lines += [Text(f"note: {remark}") for remark in remarks]
    elif outcome.found:
        closest = outcome.found[0]
        if closest.plan is not None:
            lines += [one_plan(closest.plan), Text()]
        lines.append(
            Text(f"Nothing fits into {gigabytes(outcome.budget)} GB. Closest:", style="bold")
        )
        lines.append(Text(f"{closest.method}: {closest.reason}"))
        lines += [Text(f"  what would have to give: {remedy}") for remedy in outcome.remedies]
    table = _table("method", "peak GB", "compromises", "why not", left=1)
    table.columns[2].justify = "right"
    table.columns[3].justify, table.columns[3].no_wrap = "left", False
    for item in outcome.found[0 if best is None else 1 :]:
        peak = "" if item.plan is None else f"{item.plan.needed / 1e9:.2f}"
        count = "" if item.way is None or not item.fits else str(len(item.way.compromises))
        name = item.method if item.way is None else method_words(item.way.settings)
        table.add_row(name, peak, count, item.reason)
    return Group(*lines, Text(), table)


def measured(comparison: Comparison) -> RenderableType:
    """Planned against measured, part by part."""
    table = _table("part", "planned, bytes", "measured, bytes", "")
    for name, planned, seen, exact in comparison.rows():
        if not planned and not seen:
            continue
        verdict = "equal" if planned == seen else f"{100 * (seen / (planned or 1) - 1):+.2f} %"
        style = "" if planned == seen or not exact else "bold red"
        table.add_row(
            NAMES.get(name, name), f"{planned:,}", f"{seen:,}", Text(verdict, style=style)
        )
    return Group(
        Text(f"\nOne real step (the second) on {comparison.where}\n", style="bold"),
        table,
        Text(
            f"peak: above the {comparison.program / 1e6:.0f} MB that the process held without the "
            "model",
            style="dim",
        ),
    )


def _notes(notes: Sequence[str]) -> RenderableType:
    return Text("\n".join(f"note: {note}" for note in notes), style="dim")


def _failures(failed: Mapping[str, str]) -> RenderableType:
    return Text("\n" + "\n".join(f"not planned: {reason}" for reason in failed.values()))
