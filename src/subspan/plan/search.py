"""The best way of training that a budget allows.

For every method, ways of training are tried in the order of their compromises: with the rank, state
format, micro-batch and step that were asked for; then with activations recomputed, int8 states, a
smaller rank, micro-batches, updates in the backward pass. The first that fits is the method's own.
Which method is best, `subspan.plan.evidence` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from subspan.optim import lookup
from subspan.plan.evidence import LOSSES, tier
from subspan.plan.model import meta_model
from subspan.plan.planning import make_plan
from subspan.plan.result import Plan
from subspan.plan.settings import Checkpointing, Settings
from subspan.train.errors import JobError

_SMALLEST_RANK = 16
# Halvings of rank and batch that are tried.
_HALVINGS = 3


@dataclass(frozen=True)
class Way:
    """One way of training, and in what it falls short of what was asked for.

    Args:
        settings: the way.
        compromises: in words, one for each.
        last: whether it makes every compromise that there is.
    """

    settings: Settings
    compromises: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True)
class Found:
    """What a search says of one method.

    Args:
        method: its name.
        way: that fits with the fewest compromises; else the one that needs the least.
        plan: of that way; None if the method refuses all of them.
        fits: whether it fits.
        reason: why it is not the best; empty for the best.
    """

    method: str
    way: Way | None
    plan: Plan | None
    fits: bool
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of a search, best first.

    Args:
        budget: bytes.
        found: one per method.
        remedies: where nothing fits, what would have to give, each with what is then needed.
    """

    budget: int
    found: tuple[Found, ...]
    remedies: tuple[str, ...] = ()

    @property
    def best(self) -> Found | None:
        """The winner, if anything fits."""
        return self.found[0] if self.found and self.found[0].fits else None


def search(
    base: Settings,
    methods: Sequence[str],
    budget: int,
    options_of: Callable[[str], dict[str, Any]],
    *,
    free_rank: bool = True,
    free_storage: bool = True,
    progress: Callable[[str], None] = lambda method: None,
) -> Outcome:
    """Find for every method the way of training with the fewest compromises that fits.

    Args:
        base: what was asked for.
        methods: registered names.
        budget: bytes of one device.
        options_of: the options that were asked for, by method.
        free_rank: whether the rank may be chosen.
        free_storage: whether the format of states may be chosen.
        progress: called with the name of each method before it is searched.

    Raises:
        JobError: the model cannot be built.
    """
    found = []
    for method in methods:
        progress(method)
        start = replace(base, method=method, options=options_of(method))
        found.append(_search_method(start, budget, free_rank, free_storage))
    found.sort(key=_key)
    ordered = tuple(
        item if place == 0 else replace(item, reason=item.reason or _reason(item, found[0]))
        for place, item in enumerate(found)
    )
    outcome = Outcome(budget, ordered)
    if outcome.best is None and ordered and ordered[0].way is not None:
        return replace(outcome, remedies=tuple(_remedies(ordered[0].way.settings, budget)))
    return outcome


def _key(item: Found) -> tuple[Any, ...]:
    """Best first; then what fits nothing by how little it needs; then what is refused."""
    if item.plan is None or item.way is None:
        return (2, item.method)
    if not item.fits:
        return (1, item.plan.needed)
    plain = item.method != "adamw"
    loss = LOSSES.get(item.method, float("inf"))
    return (0, tier(item.method), len(item.way.compromises), plain, loss, item.method)


def _search_method(start: Settings, budget: int, free_rank: bool, free_storage: bool) -> Found:
    """The first way that fits; if none does, the one that needs the least."""
    ways = sorted(_ways(start, free_rank, free_storage), key=lambda way: len(way.compromises))
    refusal = ""
    least: tuple[Plan, Way] | None = None
    # Whether any fits is settled by those with all compromises, of which there are few.
    for way in (way for way in ways if way.last):
        try:
            plan = make_plan(way.settings)
        except JobError as error:
            refusal = refusal or str(error)
        else:
            least = min(least or (plan, way), (plan, way), key=lambda pair: pair[0].needed)
    if least is None:
        return Found(start.method, None, None, False, refusal)
    if least[0].needed > budget:
        return Found(start.method, least[1], least[0], False, _excess(least[0], budget))
    for way in ways:
        with suppress(JobError):  # A method may refuse one format, or updates in the backward pass.
            plan = make_plan(way.settings)
            if plan.needed <= budget:
                return Found(start.method, way, plan, True)
    raise AssertionError("one of the ways fits")


def _ways(start: Settings, free_rank: bool, free_storage: bool) -> Iterator[Way]:
    """Every way of training that is tried."""
    ranks = _ranks(start, free_rank)
    formats = _formats(start, free_storage)
    recompute: list[tuple[Checkpointing, tuple[str, ...]]] = [(start.checkpointing, ())]
    if start.checkpointing == "none":
        recompute.append(("full", ("activations recomputed",)))
    steps = list(_steps(start))
    for (rank, low), (storage, few), (checkpointing, again), (change, less, final) in product(
        ranks, formats, recompute, steps
    ):
        options = {**start.options, **rank, **storage}
        settings = replace(start, options=options, checkpointing=checkpointing, **change)
        last = final and rank == ranks[-1][0] and checkpointing == recompute[-1][0]
        yield Way(settings, (*low, *few, *again, *less), last)


Choice = tuple[dict[str, Any], tuple[str, ...]]


def _ranks(start: Settings, free: bool) -> list[Choice]:
    """From a quarter of the model's width downwards, as the literature's ranks are chosen."""
    default = lookup(start.method).defaults.get("rank")
    if not free or not isinstance(default, int) or default <= 1:
        return [({}, ())]
    config: Any = getattr(meta_model(start.model).module, "config", None)
    width = getattr(config.get_text_config(), "hidden_size", None) if config is not None else None
    largest = max(1, width // 4) if isinstance(width, int) else default
    return [
        ({"rank": largest >> halvings}, ("rank halved",) * halvings)
        for halvings in range(_HALVINGS + 1)
        if halvings == 0 or largest >> halvings >= _SMALLEST_RANK
    ]


def _formats(start: Settings, free: bool) -> list[Choice]:
    if not free:
        return [({}, ())]
    if lookup(start.method).defaults["storage"] != "parameter":
        return [({}, ("states in few bits, as the method has them",))]
    return [({}, ()), ({"storage": "int8"}, ("int8 states",))]


def _steps(start: Settings) -> Iterator[tuple[dict[str, Any], tuple[str, ...], bool]]:
    """(changed fields, compromises, whether it is the last of its kind)."""
    yield {}, (), start.batch_size == 1
    halvings = [n for n in range(1, 8) if start.batch_size % (1 << n) == 0]
    for number in halvings:
        parts = {
            "batch_size": start.batch_size >> number,
            "accumulation": start.accumulation << number,
        }
        yield parts, ("micro-batches",), number == halvings[-1]
    if start.update_in_backward or start.accumulation > 1 or start.ranks > 1:
        return
    hooks = {"update_in_backward": True, "clipping": "each"}
    each = "updates in the backward pass, each gradient clipped by its own norm"
    yield hooks, (each,), not halvings
    for number in halvings[:_HALVINGS]:
        smaller = {**hooks, "batch_size": start.batch_size >> number}
        last = number == halvings[:_HALVINGS][-1]
        yield smaller, (each, *("batch halved",) * number), last


# ---------------------------------------------------------------------- reasons


def _excess(plan: Plan, budget: int) -> str:
    """Why a method does not fit: by how much, and its largest part."""
    parts = {"weights": plan.weights, "gradients": plan.gradients, "states": plan.state}
    if plan.peak is not None:
        parts |= {"activations": plan.peak.activations, "gradients": plan.peak.gradients}
    name, size = max(parts.items(), key=lambda item: item[1])
    return (
        f"needs {plan.needed / 1e9:.2f} GB even with every compromise, "
        f"{(plan.needed - budget) / 1e9:.2f} too much; most are {name}, {size / 1e9:.2f}"
    )


def _reason(item: Found, best: Found) -> str:
    """Why a method that fits is not the best."""
    assert item.way is not None and best.way is not None
    if tier(item.method) != tier(best.method):
        if item.method not in LOSSES:
            return "fits; nothing is known of its quality here"
        above = LOSSES[item.method] / LOSSES["adamw"] - 1
        return f"fits; its loss in our small job is {above:+.1%} against AdamW's"
    more = len(item.way.compromises) - len(best.way.compromises)
    if more:
        return f"fits with {more} more {'compromise' if more == 1 else 'compromises'}"
    if best.method == "adamw":
        return "fits as well; AdamW itself needs no more compromises"
    return f"fits as well; loss {LOSSES[item.method]:.3f} against {LOSSES[best.method]:.3f}"


def _remedies(closest: Settings, budget: int) -> Iterator[str]:
    """What would have to give for the closest way to fit."""
    for words, change in _changes(closest):
        with suppress(JobError):  # One change may not go together with what was asked for.
            settings = change()
            needed = make_plan(settings).needed
            fits = needed <= budget
            yield f"{words}: {needed / 1e9:.2f} GB{', fits' if fits else ''}"
            if fits and settings.ranks > 1:
                return


def _changes(closest: Settings) -> Iterator[tuple[str, Callable[[], Settings]]]:
    model = closest.model
    if not model.int8_weights and model.adapter is None:
        few = replace(model, int8_weights=True)
        yield "--int8-weights", lambda: replace(closest, model=few)
    half = model.sequence_length // 2
    shorter = replace(model, sequence_length=half)
    yield f"--sequence-length {half}", lambda: replace(closest, model=shorter)
    for number in (2, 4, 8, 16, 32, 64):
        many = partial(replace, closest, ranks=number, update_in_backward=False, clipping="whole")
        yield f"FSDP2 over {number} devices (--ranks {number})", many
