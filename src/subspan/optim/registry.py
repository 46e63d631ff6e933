"""The registry of recipes: name -> constructor, paper, defaults, parts.

A recipe is a function with explicit keyword arguments and the paper's defaults that returns a
`Composition`. The decorator turns it into a constructor, a subclass of `SubspaceOptimizer` with
that signature, and registers it. Listings, docs/METHODS.md and the contract tests are generated
from the registry.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from subspan.optim.composition import Composition
from subspan.optim.engine import SubspaceOptimizer
from subspan.optim.parts.inner import check_non_negative
from subspan.optim.parts.refresh import resolve_refresh
from subspan.optim.parts.storage import Storage
from subspan.optim.roster import Parameters
from subspan.subspaces.layout import check_rank
from subspan.subspaces.ranks import EnergyRank

# Options of the engine, which every recipe has besides its own.
ENGINE_OPTIONS: dict[str, Any] = {
    "project": None,
    "stacked": False,
    "refresh": None,
    "storage": "parameter",
    "stochastic_rounding": True,
    "nonfinite": "raise",
    "seed": 0,
}


@dataclass(frozen=True)
class Recipe:
    """One registered method.

    Args:
        name: key in the registry.
        title: published name.
        paper: authors, title, year, arXiv id.
        function: keyword arguments -> `Composition`.
        defaults: every hyper-parameter and its default, engine options included.
        own: names of the recipe function's arguments.
        memory: optimizer-state elements of an m x n matrix, m <= n, as a formula.
        evidence: what proves it equal to the paper.
        departures: where it differs from the authors' code on purpose.
    """

    name: str
    title: str
    paper: str
    function: Callable[..., Composition]
    defaults: Mapping[str, Any]
    own: tuple[str, ...]
    memory: str
    evidence: tuple[str, ...]
    departures: tuple[str, ...] = ()
    constructor: type[SubspaceOptimizer] | None = None

    @property
    def structure(self) -> tuple[str, ...]:
        """The hyper-parameters from which the composition is made."""
        return (*self.own, "storage", "refresh")

    @property
    def summary(self) -> str:
        """First sentence of the recipe's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n\n")[0].replace("\n", " ")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse unknown hyper-parameters.

        Raises:
            TypeError: naming the option, the nearest known one, and all of them.
        """
        for option in options:
            if option not in self.defaults or option == "method":
                near = difflib.get_close_matches(str(option), self.defaults, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                known = ", ".join(key for key in self.defaults if key != "method")
                raise TypeError(f"{self.title} has no option {option!r}{hint}; it has {known}")

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Refuse values of the engine's options that are not allowed.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        lr = float(group["lr"])
        if not math.isfinite(lr) or lr < 0:
            raise ValueError(f"lr={group['lr']!r} must be a finite number of at least 0")
        check_non_negative(weight_decay=group["weight_decay"])
        if group["project"] not in (None, True, False):
            raise ValueError(f"project={group['project']!r} must be True, False or None")
        for name in ("stacked", "stochastic_rounding"):
            if not isinstance(group[name], bool):
                raise ValueError(f"{name}={group[name]!r} must be True or False")
        if group["nonfinite"] not in ("raise", "skip", "ignore"):
            raise ValueError(
                f"nonfinite={group['nonfinite']!r} must be 'raise', 'skip' or 'ignore'"
            )
        if not isinstance(group["seed"], int) or group["seed"] < 0:
            raise ValueError(f"seed={group['seed']!r} must be an integer of at least 0")
        if group.get("rank") is not None and not isinstance(group["rank"], EnergyRank):
            check_rank(group["rank"])

    def compose(self, group: Mapping[str, Any]) -> Composition:
        """The composition for a group's hyper-parameters."""
        arguments = {name: group[name] for name in self.own}
        if arguments.get("rank", 1) is None:
            arguments["rank"] = self.defaults["rank"]
        for name, value in arguments.items():
            # Checkpoints through JSON or YAML bring lists.
            arguments[name] = tuple(value) if isinstance(value, list) else value
        made = self.function(**arguments)
        if group["refresh"] is not None:
            if made.finder is None:
                raise ValueError(
                    f"refresh={group['refresh']!r}: {self.title} has no subspace to refresh"
                )
            made = replace(made, refresh=resolve_refresh(group["refresh"], made.refresh))
        return made.stored_as(Storage.parse(group["storage"]))


_RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str,
    *,
    paper: str,
    lr: float,
    memory: str,
    evidence: tuple[str, ...],
    weight_decay: float = 0.0,
    storage: str | Mapping[str, str] = "parameter",
    departures: tuple[str, ...] = (),
) -> Callable[[Callable[..., Composition]], type[SubspaceOptimizer]]:
    """Register a recipe function and turn it into an optimizer class of the same name.

    Args:
        name: key in the registry, snake_case.
        paper: authors, title, year, arXiv id.
        lr: default learning rate.
        memory: see `Recipe`.
        evidence: see `Recipe`.
        weight_decay: default weight decay.
        storage: default formats of the state.
        departures: see `Recipe`.
    """

    def register(function: Callable[..., Composition]) -> type[SubspaceOptimizer]:
        own = inspect.signature(function).parameters
        defaults: dict[str, Any] = {"method": name, "lr": lr, "weight_decay": weight_decay}
        defaults |= {key: parameter.default for key, parameter in own.items()} | ENGINE_OPTIONS
        defaults["storage"] = storage
        entry = Recipe(
            name,
            function.__name__,
            paper,
            function,
            defaults,
            tuple(own),
            memory,
            evidence,
            departures,
        )
        made = _constructor(entry)
        _RECIPES[name] = made.recipe
        return made

    return register


def _constructor(entry: Recipe) -> type[SubspaceOptimizer]:
    """The optimizer class of a recipe, with the recipe's options as its signature."""

    def construct(self: SubspaceOptimizer, params: Parameters, **options: Any) -> None:
        SubspaceOptimizer.__init__(self, params, **options)

    function = entry.function
    body = {"__init__": construct, "__doc__": function.__doc__, "__module__": function.__module__}
    made: type[SubspaceOptimizer] = type(entry.title, (SubspaceOptimizer,), body)
    shown = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value)
        for key, value in entry.defaults.items()
        if key != "method"
    ]
    params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    made.__signature__ = inspect.Signature([params, *shown])  # type: ignore[attr-defined]
    made.recipe = replace(entry, constructor=made)
    return made


def _composed(*, composition: Composition | None = None) -> Composition:
    """An optimizer from any legal combination of parts, also ones that no paper has.

    Args:
        composition: the parts; its storage is replaced by the `storage` option.
    """
    if not isinstance(composition, Composition):
        raise ValueError(f"composition={composition!r} must be a subspan.optim.Composition")
    return composition


Composed = _constructor(
    Recipe(
        name="composed",
        title="Composed",
        paper="",
        function=_composed,
        defaults={"method": "composed", "lr": 1e-3, "weight_decay": 0.0, "composition": None}
        | ENGINE_OPTIONS,
        own=("composition",),
        memory="as its parts declare",
        evidence=(),
    )
)


def methods() -> dict[str, Recipe]:
    """All registered recipes by name."""
    import subspan.optim.recipes  # noqa: F401  (importing registers them)

    return dict(_RECIPES)


def _spelled(name: str) -> str:
    """A published spelling ("SubTrack++", "GaLore 2", "APOLLO-Mini") as a key might be written."""
    text = name.lower().replace("++", "_pp").replace("+", "_plus")
    return text.replace("-", "_").replace(" ", "_")


def lookup(name: str) -> Recipe:
    """The recipe of that name; published spellings ("GaLore", "APOLLO-Mini") are understood.

    Raises:
        ValueError: naming the nearest and all known methods.
    """
    known = methods()
    key = _spelled(name) if isinstance(name, str) else name
    if key in known:
        return known[key]
    plain = {text.replace("_", ""): n for n, r in known.items() for text in (n, _spelled(r.title))}
    if str(key).replace("_", "") in plain:
        return known[plain[str(key).replace("_", "")]]
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"method={name!r} is not known{hint}: use one of {', '.join(sorted(known))}")


def build(name: str, params: Parameters, **options: Any) -> SubspaceOptimizer:
    """Build a registered recipe by name.

    Args:
        name: see `methods()`.
        params: parameters, named parameters or param groups.
        options: hyper-parameters of the recipe.

    Raises:
        ValueError: for an unknown name or a value that is not allowed.
        TypeError: for an option that the recipe does not have.
    """
    constructor = lookup(name).constructor
    assert constructor is not None
    return constructor(params, **options)
