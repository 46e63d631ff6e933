"""An optimizer's parameters: how each of them is seen, and what updates it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim.bucket import Bucket
from subspan.optim.composition import Composition
from subspan.optim.groups import (
    check_exactness,
    is_projected,
    lay_out,
    unique,
)
from subspan.optim.placing import is_sharded
from subspan.optim.resting import follow_activity, rests, wake
from subspan.optim.sharding import Sharding, Standin
from subspan.subspaces.bases import Subspace
from subspan.subspaces.layout import Layout
from subspan.subspaces.ranks import EnergyRank

if TYPE_CHECKING:
    from subspan.optim.registry import Recipe

Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Roster(torch.optim.Optimizer):
    """Param groups with a layout for every parameter and a composition for every group."""

    recipe: Recipe
    _constructing = False

    def __init__(self, params: Parameters, **options: Any) -> None:
        self.recipe.check_options(options)
        self._largest = 0
        self.sharding: Sharding | None = None
        self._layouts: dict[Tensor, Layout] = {}
        self._idle_layouts: dict[Tensor, Layout] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._homes: dict[Tensor, tuple[torch.device, torch.dtype]] = {}
        self._positions: dict[Tensor, int] = {}
        self._compositions: list[tuple[list[Any], Composition]] = []
        self._constructing = True
        super().__init__(params, {**self.recipe.defaults, **options})
        self._constructing = False
        for _, composition in self._compositions:
            self._check_names(composition)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own hyper-parameters override the optimizer's.

        Duplicates within it count once.
        """
        given = {key for key in param_group if key not in ("params", "param_names")}
        self.recipe.check_options(dict.fromkeys(given))
        param_group["params"] = unique(param_group["params"])
        wake(item[1] if isinstance(item, tuple) else item for item in param_group["params"])
        if param_group.get("rank") is not None and param_group.get("project") is None:
            param_group["project"] = True  # a group that sets a rank of its own means all of it
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["steps"] = 0
        try:
            self.recipe.check_group(group)
            composition = self.recipe.compose(group)
            self._lay_out(group, composition)
            if not self._constructing:  # else a later group may have what this one lacks
                self._check_names(composition)
        except Exception:
            self.param_groups.pop()
            for parameter in group["params"]:
                self._layouts.pop(parameter, None)
                self._idle_layouts.pop(parameter, None)
                self._positions.pop(parameter, None)
                if self.sharding is not None:
                    self.sharding.forget(parameter)
            raise
        self._compositions.append((self._snapshot(group), composition))
        if composition.activity is not None and composition.activity.freezes:
            follow_activity(self, group, composition.activity)

    def _lay_out(self, group: dict[str, Any], composition: Composition) -> None:
        """Decide how every parameter of a new group is seen."""
        names = group.get("param_names") or [None] * len(group["params"])
        for parameter, name in zip(group["params"], names, strict=True):
            index = len(self._layouts)
            projected = is_projected(group, composition, parameter, name)
            compositions = [composition, *filter(None, [composition.idle])]
            arguments = (parameter, name or str(index), index, projected)
            layouts = [lay_out(group, parts, *arguments) for parts in compositions]
            layouts = self._place(parameter, layouts, compositions)
            self._layouts[parameter] = layouts[0]
            if composition.idle is not None:
                self._idle_layouts[parameter] = layouts[1]
            self._homes[parameter] = (parameter.device, parameter.dtype)
            self._positions[parameter] = len(self._compositions)
            check_exactness(composition, self._layouts[parameter], parameter)
        if self.sharding is not None:
            self.sharding.share_out()
        self._largest = max((layout.natural_size for layout in self._layouts.values()), default=0)
        everyone = self.projected(group)
        self._places.update((p, (i, len(everyone))) for i, p in enumerate(everyone))
        if composition.activity is not None:
            composition.activity.check([self._layouts[parameter] for parameter in everyone])

    def _check_names(self, composition: Composition) -> None:
        """Refuse settings for parameters that do not exist.

        Raises:
            ValueError: naming one, and those of the parameters' names that are most like it.
        """
        known = [layout.name for layout in self._layouts.values()]
        for name in composition.inner.names():
            if name not in known:
                closest = get_close_matches(name, known, n=8, cutoff=0.0)
                raise ValueError(
                    f"no parameter is called {name!r}; of the {len(known)} names those most like "
                    f"it are {', '.join(map(repr, closest))}"
                )

    def _place(
        self, parameter: Tensor, layouts: list[Layout], compositions: list[Composition]
    ) -> list[Layout]:
        """The layouts of this rank's piece of a sharded parameter; of others, the same."""
        if not is_sharded(parameter):
            return layouts
        if self.sharding is None:
            self.sharding = Sharding(self)  # type: ignore[arg-type]
        pairs = zip(layouts, compositions, strict=True)
        return self.sharding.place(parameter, [(lay, c.parts_for(lay)) for lay, c in pairs])

    def weight_of(self, parameter: Tensor) -> Tensor:
        """The weight that a step works on: the parameter, or what stands in for it."""
        if self.sharding is not None and is_sharded(parameter):
            return self.sharding.weight(parameter)
        return parameter

    def held(self, parameter: Tensor) -> Standin:
        """The same with its gradient, which there must be."""
        if self.sharding is not None and is_sharded(parameter):
            return self.sharding.standin(parameter)
        assert parameter.grad is not None
        return Standin(parameter, parameter.grad)

    def projected(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group to which the recipe's subspace or activity applies."""
        return [parameter for parameter in group["params"] if self._layouts[parameter].projected]

    def layout_of(self, parameter: Tensor) -> Layout:
        """How a parameter is seen: side, rank, shapes."""
        return self.layout_in(parameter, self._is_active(parameter))

    def layout_in(self, parameter: Tensor, active: bool) -> Layout:
        """The same for a period in which it is active, or is not."""
        layouts = self._layouts if active else self._idle_layouts
        return layouts.get(parameter, self._layouts[parameter])

    def set_layout(self, parameter: Tensor, layout: Layout) -> None:
        """Change how a parameter is seen; its state has to be changed with it."""
        self._layouts[parameter] = layout

    def knows(self, parameter: Tensor) -> bool:
        """Whether it is one of the optimizer's."""
        return parameter in self._layouts

    def subspace_of(self, parameter: Tensor) -> Subspace | None:
        """The subspace in force for a parameter; None if it has none, or before its first step."""
        state, parts = self.state[parameter], self.parts_of(parameter)
        if parts is None or parts.finder is None or not state.get("refreshed"):
            return None
        layout = self.layout_of(parameter)
        bucket = Bucket([parameter], [], [state], [layout], 0, 0, codecs=parts.codecs(layout))
        return parts.finder.unpack(bucket.load(), layout, bucket.dtype, bucket.device)

    def place_of(self, parameter: Tensor) -> tuple[int, int]:
        """Position of a projected parameter among those of its group, and their number."""
        return self._places[parameter]

    def check_home(self, parameter: Tensor) -> None:
        """Refuse a parameter that has moved since the optimizer was built.

        Raises:
            RuntimeError: naming the parameter and both places.
        """
        home, now = self._homes[parameter], (parameter.device, parameter.dtype)
        if home != now:
            raise RuntimeError(
                f"parameter {self._layouts[parameter].name!r} was on {home[0]} as {home[1]} when "
                f"the optimizer was built and is on {now[0]} as {now[1]} now: move the model first "
                "and build the optimizer afterwards"
            )

    def _is_active(self, parameter: Tensor) -> bool:
        if parameter not in self.state:
            return not rests(parameter)
        return bool(self.state[parameter].get("active", 1))

    def _snapshot(self, group: dict[str, Any]) -> list[Any]:
        return [group[name] for name in self.recipe.structure]

    def composition(self, position: int) -> Composition:
        """The parts of a param group, rebuilt when its hyper-parameters have changed.

        Raises:
            ValueError: if the change would alter the layout or the state of a parameter (rank,
                side, storage, ...).
        """
        group = self.param_groups[position]
        snapshot, composition = self._compositions[position]
        current = self._snapshot(group)
        if current == snapshot:
            return composition
        self.recipe.check_group(group)
        new = self.recipe.compose(group)
        for parameter in group["params"]:
            old = self._layouts[parameter]
            layout = lay_out(group, new, parameter, old.name, old.index, old.projected)
            if self.sharding is not None:
                layout = self.sharding.as_placed(parameter, layout)
            if isinstance(new.rank, EnergyRank):
                layout = replace(layout, rank=old.rank)
            before, after = composition.parts_for(old), new.parts_for(layout)
            same_state = before.declarations(old) == after.declarations(layout)
            same_state &= self.sharding is None or self.sharding.keeps_way(parameter, old, after)
            if layout != old or not same_state or composition.storage != new.storage:
                changed = [
                    f"{name} from {was!r} to {now!r}"
                    for name, was, now in zip(self.recipe.structure, snapshot, current, strict=True)
                    if was != now
                ]
                raise ValueError(
                    f"{', '.join(changed)}: this changes the state of parameter {old.name!r} in "
                    "the middle of a run; build a new optimizer instead"
                )
        self._compositions[position] = (current, new)
        return new

    def parts_of(self, parameter: Tensor) -> Composition | None:
        """The composition that updates a parameter; None while it rests."""
        return self.parts_in(parameter, self._is_active(parameter))

    def parts_in(self, parameter: Tensor, active: bool) -> Composition | None:
        """The same for a period in which it is active, or is not."""
        composition: Composition | None = self.composition(self._positions[parameter])
        assert composition is not None
        if not active:
            composition = composition.idle
        return None if composition is None else composition.parts_for(self._layouts[parameter])
