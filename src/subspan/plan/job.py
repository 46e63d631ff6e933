"""`subspan plan` from a request to its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from subspan.plan.budget import COUNTING
from subspan.plan.command import train_command
from subspan.plan.evidence import RULE
from subspan.plan.measure import Comparison, measure
from subspan.plan.model import meta_model
from subspan.plan.planning import make_plan
from subspan.plan.request import Request
from subspan.plan.result import Plan, as_dict
from subspan.plan.search import Outcome, search
from subspan.train.errors import JobError


@dataclass
class Result:
    """What a request led to.

    Args:
        plans: one per method that can be planned.
        failed: the reason for each of the others.
        outcome: of a search.
        comparison: with a measurement.
    """

    plans: list[Plan] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    outcome: Outcome | None = None
    comparison: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold; see docs/PLAN.md."""
        values: dict[str, Any] = {
            "version": 1,
            "counting": COUNTING,
            "plans": [as_dict(plan) for plan in self.plans],
            "failed": self.failed,
        }
        if self.outcome is not None:
            values["search"] = _outcome(self.outcome)
        if self.comparison is not None:
            rows = self.comparison.rows()
            values["measured"] = {
                "where": self.comparison.where,
                "program": self.comparison.program,
                "parts": {
                    name: {"planned": planned, "measured": seen, "exact": exact}
                    for name, planned, seen, exact in rows
                },
            }
        return values


def _outcome(outcome: Outcome) -> dict[str, Any]:
    best = outcome.best
    command = None if best is None or best.way is None else train_command(best.way.settings)
    return {
        "budget": outcome.budget,
        "rule": RULE,
        "best": None if best is None else best.method,
        "command": None if command is None else command[0],
        "remarks": [] if command is None else command[1],
        "remedies": list(outcome.remedies),
        "methods": [
            {
                "method": item.method,
                "fits": item.fits,
                "needed": None if item.plan is None else item.plan.needed,
                "compromises": None if item.way is None else list(item.way.compromises),
                "reason": item.reason,
            }
            for item in outcome.found
        ],
    }


def run_plan(
    request: Request,
    budget: int | None = None,
    measuring: bool = False,
    progress: Callable[[str], None] = lambda method: None,
) -> Result:
    """Plan, search or measure.

    Args:
        request: what is planned.
        budget: bytes; search what fits.
        measuring: run one real step of the one method that is planned.
        progress: called with what is being worked on.

    Raises:
        JobError: the model cannot be built; the one method cannot be planned or measured.
    """
    progress("model")
    meta_model(request.base.model)
    if measuring:
        if len(request.methods) != 1 or budget is not None:
            raise JobError("--measure runs one method: name it with --method, without --budget")
        comparison = measure(request.settings_of(request.methods[0]))
        return Result([comparison.plan], comparison=comparison)
    if budget is not None:
        outcome = search(
            request.base,
            request.methods,
            budget,
            request.options_of,
            free_rank=request.rank is None,
            free_storage=request.storage is None,
            progress=progress,
        )
        plans = [item.plan for item in outcome.found if item.plan is not None]
        failed = {item.method: item.reason for item in outcome.found if item.plan is None}
        return Result(plans, failed, outcome)
    result = Result()
    for method in request.methods:
        progress(method)
        try:
            result.plans.append(make_plan(request.settings_of(method)))
        except JobError as error:
            if len(request.methods) == 1:
                raise
            result.failed[method] = str(error)
    return result
