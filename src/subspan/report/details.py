"""Sections of the report about how it was made: configuration, versions, inputs."""

from __future__ import annotations

from html import escape
from typing import Any

from subspan.report.loading import Report


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:
    if value is None or value == {}:
        return "—"
    if isinstance(value, list):
        return escape(", ".join(map(str, value)))
    return escape(str(value))


def _pairs(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{escape(k)}</td><td>{_text(v)}</td></tr>" for k, v in values.items())
    return f'<div class="scroll"><table class="plain"><tbody>{"".join(rows)}</tbody></table></div>'


def configuration(report: Report) -> str:
    """What differs between the arms as a table, and below it what they share."""
    configs = {}
    for arm in report.arms:
        known = [run.config for run in arm.runs if run.config is not None]
        if known:
            seeds = [config.seed for config in known]
            configs[arm.name] = flatten(
                known[0].identity() | {"seed": seeds if len(seeds) > 1 else seeds[0]}
            )
    if not configs:
        return ""
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    # An empty mapping says no more than the absence of its keys, which have rows of their own.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    columns = list(configs.values())
    differing = [k for k in keys if any(c.get(k) != columns[0].get(k) for c in columns)]
    shared = {k: columns[0].get(k) for k in keys if k not in differing}
    parts = ['<section class="card wide"><h2>Configuration</h2>']
    if differing:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in configs)
        rows = "".join(
            f"<tr><td>{escape(key)}</td>"
            + "".join(f"<td>{_text(config.get(key))}</td>" for config in columns)
            + "</tr>"
            for key in differing
        )
        parts.append(
            '<p class="note">what differs between the runs</p><div class="scroll">'
            f'<table class="plain"><thead><tr><th scope="col"></th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    parts.append(
        f"<details><summary>{'Shared settings' if differing else 'Settings'}</summary>"
        f"{_pairs(shared)}</details></section>"
    )
    return "".join(parts)


def software(report: Report) -> str:
    """Versions, kind of machine and input hashes of the first finished run."""
    result = next((run.result for run in report.runs if run.result), None)
    if result is None:
        return ""
    machine = flatten(result["machine"])
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    facts = {
        "versions": versions,
        **{name: value for name, value in machine.items() if value is not None},
        **flatten(result["inputs"]),
    }
    return (
        '<section class="card wide"><details><summary>Versions, machine and inputs</summary>'
        f"{_pairs(facts)}</details></section>"
    )
