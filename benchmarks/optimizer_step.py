"""Interleaved timing of optimizer steps.

The optimizers of one family (ours and its peers) each own a copy of the same parameters and
gradients and take turns, one step each per round, in one process and on one thread. A ratio is the
median of the per-round ratios, so that a change of the machine's speed hits both sides of it.

A short gap makes refreshes frequent enough to time; it does not change what either kind of step
costs, and amortised times are computed for the paper's gap. Optimizers whose steps take long stop
once everything has been seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.contenders import Contender
from benchmarks.floors import step_bytes, step_flops
from benchmarks.measure import (
    Elapsed,
    optimizer_bytes,
    peak_allocated,
    peak_resident,
    release_memory,
    timed,
)
from benchmarks.rates import Machine, Rates
from benchmarks.shapes import Model, Parameters, Shape

TIMED_GAP = 4
PAPER_GAP = 200
_WARM_UP = 2  # steps after which caches, threads and lazily built buffers are settled
_SLOW = 0.4  # seconds


@dataclass(frozen=True)
class Schedule:
    """How often a family's optimizers are stepped.

    Args:
        timed: rounds that are only timed: the first step and some gaps with one refresh each.
        rounds: all of them; memory is watched in those that follow the timed ones.
    """

    timed: int
    rounds: int


THOROUGH = Schedule(timed=2 * TIMED_GAP + 1, rounds=13)
QUICK = Schedule(timed=TIMED_GAP + 1, rounds=11)


def kind_of_step(index: int, phase: int | None, gap: int = TIMED_GAP) -> str:
    """'first' (allocates the state), 'refresh' (recomputes every basis) or 'normal'."""
    if index == 0:
        return "first"
    return "refresh" if phase is not None and (index + phase) % gap == 0 else "normal"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass
class Run:
    """One contender's live optimizer and what was measured of it."""

    contender: Contender
    optimizer: torch.optim.Optimizer | None
    schedule: Schedule = QUICK
    error: str = ""
    times: dict[str, dict[int, Elapsed]] = field(default_factory=dict)
    peaks: dict[str, dict[str, int | None]] = field(default_factory=dict)

    def step(self, index: int) -> None:
        """Take step `index` and measure its time, its memory, or both."""
        last = self.schedule.timed - 1
        late, slow = index > last, self._is_slow()
        if self.optimizer is None or (late and slow and self._has_seen_all()):
            return
        step = self.optimizer.step
        kind = kind_of_step(index, self.contender.phase)
        peaks, times = self.peaks.setdefault(kind, {}), self.times.setdefault(kind, {})
        unwatched = "resident" not in peaks
        try:
            if late and "allocated" not in peaks:
                peaks["allocated"] = peak_allocated(step)  # the profiler slows the step
            elif (kind == "refresh" and index > last - TIMED_GAP) or (
                slow and unwatched and index >= last
            ):
                # Of steps that take long, one is both timed and watched, which costs it little.
                peaks["resident"] = peak_resident(lambda: times.update({index: timed(step)}))
            elif late and unwatched:
                peaks["resident"] = peak_resident(step)
            else:
                times[index] = timed(step)
        except Exception as error:  # a peer's failure is a row, not the end of the run
            self.optimizer = None
            self.error = _first_line(error)

    def _is_slow(self) -> bool:
        normal = self.seconds("normal")
        return bool(normal) and statistics.median(normal) > _SLOW

    def _has_seen_all(self) -> bool:
        """Whether time and memory of every kind of step are known."""
        kinds = ["normal"] if self.contender.phase is None else ["normal", "refresh"]
        return all(len(self.peaks.get(kind, {})) == 2 for kind in kinds)

    def seconds(self, kind: str, clock: str = "cpu") -> list[float]:
        """Timed steps of one kind, without the warm-up."""
        steps = self.times.get(kind, {})
        return [getattr(e, clock) for i, e in steps.items() if kind == "first" or i >= _WARM_UP]

    def extra_per_step(self) -> float:
        """What refreshes cost beyond normal steps, in CPU seconds per step at the papers' gap."""
        normal, refresh = self.seconds("normal"), self.seconds("refresh")
        if not normal or not refresh:
            return 0.0
        return (statistics.median(refresh) - statistics.median(normal)) / PAPER_GAP


def _start(
    contender: Contender, model: Model, shape: Shape, schedule: Schedule
) -> tuple[Run, Parameters | None]:
    parameters = model.copy()
    try:
        optimizer = contender.build(parameters, shape.rank, TIMED_GAP)
    except ImportError as error:
        return Run(contender, None, error=f"not installed ({error.name or error})"), None
    except Exception as error:
        return Run(contender, None, error=_first_line(error)), None
    return Run(contender, optimizer, schedule), parameters


def spread(values: list[float]) -> dict[str, float] | None:
    """Minimum, median and maximum."""
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _ratios(ours: Run, other: Run, kind: str) -> dict[str, float] | None:
    """Our time over the other's, round by round (refreshes by their order)."""
    if kind == "refresh":
        pairs = zip(ours.seconds(kind), other.seconds(kind), strict=False)
        return spread([a / b for a, b in pairs])
    more = [run.extra_per_step() if kind == "amortised" else 0.0 for run in (ours, other)]
    mine, theirs = ours.times.get("normal", {}), other.times.get("normal", {})
    common = [i for i in mine if i in theirs and i >= _WARM_UP]
    return spread([(mine[i].cpu + more[0]) / (theirs[i].cpu + more[1]) for i in common])


def _row(run: Run, shape: Shape) -> dict[str, Any]:
    contender = run.contender
    row: dict[str, Any] = {
        "shape": shape.name,
        "family": contender.family,
        "name": contender.name,
        "package": contender.package,
        "official": contender.official,
        "reference": contender.reference,
        "note": contender.note,
        "method": contender.method,
        "error": run.error,
    }
    if run.optimizer is None:
        return row
    for kind in ("first", "normal", "refresh"):
        row[kind] = {clock: spread(run.seconds(kind, clock)) for clock in ("cpu", "wall")}
    if row["normal"]["cpu"]:
        row["amortised"] = row["normal"]["cpu"]["median"] + run.extra_per_step()
    state, held = optimizer_bytes(run.optimizer)
    row["state"], row["held"] = asdict(state), asdict(held)
    row["peaks"] = {kind: peak for kind, peak in run.peaks.items() if peak}
    return row


def _floor(run: Run, shape: Shape, rates: list[Rates]) -> dict[str, Any]:
    """The floor from the rates of each round, and this run's steps relative to it."""
    method = run.contender.method
    floors = [now.floor(method, shape) for now in rates]
    steps = {i: t.cpu for i, t in run.times.get("normal", {}).items() if i >= _WARM_UP}
    extra = run.extra_per_step()
    return {
        "products": statistics.median(f[0] for f in floors),
        "memory": statistics.median(f[1] for f in floors),
        "flops": step_flops(method, shape),
        "bytes": step_bytes(method, shape),
        "distance": spread([seconds / sum(floors[i]) for i, seconds in steps.items()]),
        "amortised": spread([(s + extra) / sum(floors[i]) for i, s in steps.items()]),
    }


def _rates_seen(rates: list[Rates]) -> dict[str, Any]:
    """Medians over the rounds, for the report."""
    products = []
    for m, n, r in rates[0].products:
        both = [now.products[(m, n, r)] for now in rates]
        project, lift = (2 * m * n * r / statistics.median(b[i] for b in both) for i in (0, 1))
        products.append({"m": m, "n": n, "rank": r, "project": project, "lift": lift})
    squares = [
        {"side": side, "rate": statistics.median(now.squares[side] for now in rates)}
        for side in rates[0].squares
    ]
    transforms = [
        {"m": m, "n": n, "seconds": statistics.median(now.transforms[(m, n)] for now in rates)}
        for m, n in rates[0].transforms
    ]
    bandwidth = statistics.median(now.bandwidth for now in rates)
    return {
        "bandwidth": bandwidth,
        "products": products,
        "squares": squares,
        "transforms": transforms,
    }


def measure_family(
    members: list[Contender],
    model: Model,
    shape: Shape,
    machine: Machine,
    progress: Callable[[str], None],
    schedule: Schedule,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Step the members of one family in turn; return their rows and the machine's rates.

    Args:
        members: of the family.
        model: whose parameters each of them gets a copy of.
        shape: of that model.
        machine: measures rates in every round.
        progress: gets a line per member.
        schedule: how often each is stepped.
    """
    runs, kept_alive, rates = [], [], []
    for member in members:
        run, parameters = _start(member, model, shape, schedule)
        runs.append(run)
        kept_alive.append(parameters)
    methods = {member.method for member in members}
    for index in range(schedule.rounds):
        rates.append(machine.rates(shape, methods))
        # Start each round with another member: nobody always runs after the same neighbour.
        offset = index % len(runs)
        for run in runs[offset:] + runs[:offset]:
            run.step(index)
    rows = [_row(run, shape) for run in runs]
    mine = [run for run in runs if run.contender.ours and run.optimizer is not None]
    for run, row in zip(runs, rows, strict=True):
        if run.optimizer is None:
            continue
        row["floor"] = _floor(run, shape, rates)
        if run.contender.ours:
            continue
        row["ours_over_this"] = {
            our.contender.name: {
                kind: _ratios(our, run, kind) for kind in ("normal", "refresh", "amortised")
            }
            for our in mine
            if run.contender.reference or our.contender.method == run.contender.method
        }
    for run, row in zip(runs, rows, strict=True):
        said = run.error or f"{1e3 * row['normal']['cpu']['median']:.1f} ms"
        progress(f"{shape.name} {run.contender.label}: {said}")
    del runs, kept_alive
    release_memory()
    return rows, {"family": members[0].family, **_rates_seen(rates)}


def measure_staggered(model: Model, shape: Shape) -> dict[str, Any] | None:
    """CPU times over one whole gap in which our GaLore refreshes one matrix at a time."""
    import subspan.optim

    parameters = model.copy()
    gap = 2 * len(parameters.projected)  # every other step refreshes one matrix
    groups: list[dict[str, Any]] = [
        {"params": parameters.plain, "project": False},
        {"params": parameters.projected},
    ]
    optimizer = subspan.optim.build(
        "galore", groups, lr=1e-3, rank=shape.rank, update_proj_gap=gap, stagger=True
    )
    for _ in range(_WARM_UP):
        optimizer.step()
    seconds = spread([timed(optimizer.step).cpu for _ in range(gap)])
    return None if seconds is None else {"shape": shape.name, "gap": gap, **seconds}
