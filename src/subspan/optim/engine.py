"""The engine: one torch.optim.Optimizer that runs every recipe.

    bucket -> (refresh -> transport) -> project -> inner -> output -> apply

`SubspaceOptimizer._update` is that line as code. `groups` decides what is projected, `collect` what
belongs into a bucket and the state it has, `checkpoint` what may be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspan.optim import checkpoint, listing
from subspan.optim.apply import apply_update, root_mean_square
from subspan.optim.backward import BackwardUpdates, Clipping
from subspan.optim.bucket import Bucket
from subspan.optim.collect import assignments, buckets, gradients_are_usable
from subspan.optim.composition import Composition
from subspan.optim.groups import (
    check_exactness,
    check_parameters,
    is_projected,
    lay_out,
    unique,
)
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Scene, Seen, Update
from subspan.optim.parts.workspace import Workspace
from subspan.optim.refreshing import follow, look
from subspan.optim.resizing import adapt_ranks
from subspan.optim.resting import follow_activity, rests, wake
from subspan.subspaces.bases import Subspace
from subspan.subspaces.layout import Layout
from subspan.subspaces.ranks import EnergyRank

if TYPE_CHECKING:
    from subspan.optim.registry import Recipe

Plan = list[tuple[dict[str, Any], Composition, list[Tensor]]]
Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class SubspaceOptimizer(torch.optim.Optimizer):
    """Base of every recipe's constructor; see `subspan.optim.methods()` for the list.

    Args:
        params: parameters, named parameters, or param groups (dicts with "params" and any
            hyper-parameter). Names keep embeddings, output heads and norms out of the projection
            unless a group sets `rank` or `project=True` itself; without names every tensor with two
            or more dimensions is projected. A group with `rank=None` or `project=False` is not
            projected.
        options: the recipe's hyper-parameters, and for every recipe
            lr: learning rate.
            weight_decay: decoupled, `W <- W (1 - lr * weight_decay)`.
            project: True or False projects all or none of a group's tensors; None decides as above.
            stacked: read weights of more than two dimensions as batches of matrices (experts)
                instead of flattening all but the first dimension (convolutions).
            storage: format of the state, "parameter" (the parameter's dtype), "fp32" or "bf16", or
                a mapping from "first_moment", "second_moment", "basis", "error" to them.
            stochastic_rounding: write bf16 weights and moments with stochastic rounding.
            nonfinite: what to do when a gradient holds NaN or infinity. "raise": an error names the
                parameter, which is not updated; parameters that came before it may have taken the
                step. "skip": all gradients are checked first and the whole step is left out
                (counted in `skipped_steps`), which costs a pass over them. "ignore": NaN spreads.
            seed: from which every random draw derives, together with the parameter's position and
                step.

    Raises:
        ValueError: for values that are not allowed, naming argument, value and what is allowed.
        TypeError: for options that the recipe does not have.
    """

    recipe: Recipe

    def __init__(self, params: Parameters, **options: Any) -> None:
        self.recipe.check_options(options)
        self.skipped_steps = 0
        self._backward: BackwardUpdates | None = None
        self._largest = 0
        self._layouts: dict[Tensor, Layout] = {}
        self._idle_layouts: dict[Tensor, Layout] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._homes: dict[Tensor, tuple[torch.device, torch.dtype]] = {}
        self._positions: dict[Tensor, int] = {}
        self._compositions: list[tuple[list[Any], Composition]] = []
        super().__init__(params, {**self.recipe.defaults, **options})

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own hyper-parameters override the optimizer's.

        Duplicates within it count once.
        """
        given = {key for key in param_group if key not in ("params", "param_names")}
        self.recipe.check_options(dict.fromkeys(given))
        param_group["params"] = unique(param_group["params"])
        check_parameters(param_group["params"])
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
        except Exception:
            self.param_groups.pop()
            for parameter in group["params"]:
                self._layouts.pop(parameter, None)
                self._positions.pop(parameter, None)
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
            arguments = (parameter, name or str(index), index, projected)
            self._layouts[parameter] = lay_out(group, composition, *arguments)
            if composition.idle is not None:
                self._idle_layouts[parameter] = lay_out(group, composition.idle, *arguments)
            self._homes[parameter] = (parameter.device, parameter.dtype)
            self._positions[parameter] = len(self._compositions)
            check_exactness(composition, self._layouts[parameter], parameter)
        self._largest = max((layout.natural_size for layout in self._layouts.values()), default=0)
        everyone = self.projected(group)
        self._places.update((p, (i, len(everyone))) for i, p in enumerate(everyone))
        if composition.activity is not None:
            composition.activity.check([self._layouts[parameter] for parameter in everyone])

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
            if isinstance(new.rank, EnergyRank):
                layout = replace(layout, rank=old.rank)
            before, after = composition.parts_for(old), new.parts_for(layout)
            same_state = before.declarations(old) == after.declarations(layout)
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

    # ------------------------------------------------------------------ the step

    # Compiled training steps call this eagerly: bookkeeping in Python, arithmetic in a few kernels.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: a gradient is not finite and `nonfinite="raise"`. Its parameter and
                those after it have not changed.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._backward is not None:
            self._backward.finish()
        else:
            self._take_step([p for group in self.param_groups for p in group["params"]])
        return loss

    def attach_to_backward(
        self,
        model: nn.Module | None = None,
        *,
        accumulation_steps: int = 1,
        max_norm: float | None = None,
        clipping: Clipping = "whole",
        lifted: bool = False,
    ) -> BackwardUpdates:
        """Update every parameter inside the backward pass, as soon as its gradient is there.

        The gradient is freed at once, so gradients never exist all at the same time. Call `step()`
        after the backward pass as usual: it ends the step. See `BackwardUpdates`.

        Args:
            model: if given, gradients of its embeddings and output layers, where the update is
                elementwise, are made and applied in blocks of rows, never whole.
            accumulation_steps: backward passes per `step()`. With more than one, only projected
                gradients are summed, in the subspace in force.
            max_norm: clip gradients to this norm.
            clipping: "whole": by the norm of all gradients together; "inside": by that of what the
                subspaces hold of them; "each": every parameter's by its own norm.
            lifted: with accumulation, hand the lifted sum to methods that need a whole gradient
                (Flora's accumulation); what lies outside the subspace is lost.

        Returns:
            The handle; its `detach()` returns to ordinary steps.

        Raises:
            RuntimeError: already attached, or the parameters are to another optimizer.
            ValueError: the method, or clipping, cannot work so; the message says why.
        """
        self._backward = BackwardUpdates(
            self, model, accumulation_steps, max_norm, clipping, lifted
        )
        return self._backward

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's; also forgets what was accumulated inside the subspaces."""
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.forget()

    def _take_step(self, parameters: Iterable[Tensor]) -> None:
        """One step of all of the given parameters that have a gradient."""
        plan = self.plan(p for p in parameters if p.grad is not None)
        if not gradients_are_usable(self, plan):
            self.skipped_steps += 1
            return
        self.update_all(plan, Workspace())
        self.conclude([p for _, _, members in plan for p in members])

    def plan(self, parameters: Iterable[Tensor]) -> Plan:
        """The parameters by param group, each with its composition."""
        members: list[list[Tensor]] = [[] for _ in self.param_groups]
        for parameter in parameters:
            members[self._positions[parameter]].append(parameter)
        return [
            (group, self.composition(position), members[position])
            for position, group in enumerate(self.param_groups)
            if members[position]
        ]

    def update_all(self, plan: Plan, work: Workspace) -> None:
        """Update parameters, given as param group, its composition, and some of its members."""
        for group, composition, members in plan:
            adapt_ranks(self, group, composition, members)
            for parts, own in assignments(self, group, composition, members):
                for bucket in buckets(self, own, group, parts, self._largest):
                    self._update(bucket, parts, group, work)

    def conclude(self, parameters: Iterable[Tensor]) -> None:
        """What follows when all parameters of a step have been updated."""
        plan = self.plan(parameters)
        for group, composition, _ in plan:
            group["steps"] += 1
            if composition.activity is not None and composition.activity.freezes:
                follow_activity(self, group, composition.activity, group["steps"] - 1)
        concluding = [(c.inner, members) for _, c, members in plan if c.inner.concludes]
        while concluding:
            inner = concluding[0][0]
            states = [
                self.state[p] for other, members in concluding if other == inner for p in members
            ]
            inner.conclude(states)
            concluding = [item for item in concluding if item[0] != inner]

    def update_bucket(
        self, parameter: Tensor, bucket: Bucket, parts: Composition, work: Workspace
    ) -> None:
        """Update a parameter, or a piece of it, as its param group says."""
        self._update(bucket, parts, self.param_groups[self._positions[parameter]], work)

    def _update(
        self, bucket: Bucket, parts: Composition, group: dict[str, Any], work: Workspace
    ) -> None:
        """The step of one bucket: refresh, transport, project, inner, output, apply."""
        work.release()
        weight, state = bucket.gather(bucket.weights, work), bucket.load()
        lr = self._learning_rate(group, parts, weight)
        rate = 1.0 if parts.clip_rms is not None else lr * parts.lr_scale
        rate = rate * parts.inner.shape_factor(bucket.layout)
        seen = look(bucket, parts, group, state, work)
        if parts.elementwise and isinstance(parts.inner, Adam) and _contiguous(weight, seen, state):
            decay = group["weight_decay"]
            assert isinstance(rate, float)
            parts.inner.step_weights(
                [weight], [seen.gradient], [state], bucket.age, float(group["lr"]), decay, rate
            )
            self._commit(bucket, group, weight, state, False)
            return

        direction = parts.inner.update(seen.coordinates, state, bucket.age, rate, work)
        update = Update(direction.value, direction.step)
        if seen.subspace is not None:
            scene = Scene(seen, direction, bucket.layout, state, parts.inner, rate, work)
            update = parts.output.form(scene, parts.remainder)
        if parts.normaliser is not None and parts.normaliser.after:
            update.divisor = parts.normaliser.divisor(seen.gradient, state, bucket.step)
        apply_update(weight, update, seen, lr, group["weight_decay"], parts, work)

        if seen.subspace is not None and parts.finder is not None and parts.finder.follows:
            follow(bucket, parts, group, state, seen)
        self._commit(bucket, group, weight, state, seen.refreshed)

    def _commit(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        weight: Tensor,
        state: dict[str, Any],
        bases: bool,
    ) -> None:
        """Write weights and states back where they had to be copied."""
        stochastic, seed = group["stochastic_rounding"], group["seed"]
        bucket.write_weights(weight, seed, stochastic)
        bucket.commit(state, bases=bases, seed=seed, stochastic=stochastic)
        for stored in bucket.states:
            stored["step"] = bucket.step

    def _learning_rate(
        self, group: dict[str, Any], parts: Composition, weight: Tensor
    ) -> float | Tensor:
        lr = float(group["lr"])
        if parts.parameter_scale is None:
            return lr
        return root_mean_square(weight).clamp_(min=parts.parameter_scale).mul_(lr)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, but plain tensors, numbers and text: loads with `weights_only`."""
        return checkpoint.plain(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; training continues bit for bit.

        Raises:
            ValueError: for a checkpoint of another method, other parameters or another rank;
                nothing is changed then.
        """
        before = [group["steps"] for group in self.param_groups]
        checkpoint.load(self, state_dict)
        for position, (group, steps) in enumerate(zip(self.param_groups, before, strict=True)):
            activity = self.composition(position).activity
            if activity is not None and activity.freezes:
                follow_activity(self, group, activity, steps)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the optimizer's tensors by kind ("basis", ...), and their "total"."""
        return listing.state_bytes(self)

    def memory(self) -> dict[str, int]:
        """Bytes of weights, states and gradients that training will hold; see `listing.memory`."""
        return listing.memory(self)

    def summary(self) -> str:
        """A table with parameter, shape, side, rank and state bytes."""
        return listing.summary(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies."""
        kept = (
            "skipped_steps",
            "_largest",
            "_layouts",
            "_idle_layouts",
            "_places",
            "_homes",
            "_positions",
            "_compositions",
        )
        own = {name: getattr(self, name) for name in kept}
        return {**super().__getstate__(), **own, "_backward": None}


def _contiguous(weight: Tensor, seen: Seen, state: dict[str, Any]) -> bool:
    """Whether a fused kernel may walk through weight, gradient and moments alike."""
    tensors = (weight, seen.gradient, state["exp_avg"], state["exp_avg_sq"])
    return all(tensor.is_contiguous() for tensor in tensors)
