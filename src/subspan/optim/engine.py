"""The engine: one torch.optim.Optimizer that runs every recipe.

    bucket -> (refresh -> transport) -> project -> inner -> output -> apply

`SubspaceOptimizer._update` is that line as code. Everything else here decides what belongs into a bucket,
allocates declared state, and refuses what cannot work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.optim import checkpoint, listing
from subspan.optim.apply import apply_update
from subspan.optim.bucket import FIND, Bucket, pieces
from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Scene, Stateless, Update
from subspan.optim.parts.workspace import Workspace
from subspan.optim.selection import is_projected_by_name
from subspan.subspaces.bases import Subspace
from subspan.subspaces.finders import Sight
from subspan.subspaces.geometry import captured_energy
from subspan.subspaces.layout import Layout, matrix_view, projection_side, resolve_rank

if TYPE_CHECKING:
    from subspan.optim.registry import Recipe

PIECE = 1 << 20
SMALL = 1 << 16

Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class SubspaceOptimizer(torch.optim.Optimizer):
    """Base of every recipe's constructor; see `subspan.optim.methods()` for the list.

    Args:
        params: parameters, named parameters, or param groups (dicts with "params" and any hyper-parameter). Names
            keep embeddings, output heads and norms out of the projection unless a group sets `rank` or
            `project=True` itself; without names every tensor with two or more dimensions is projected.
            A group with `rank=None` or `project=False` is not projected.
        options: the recipe's hyper-parameters, and for every recipe
            lr: learning rate.
            weight_decay: decoupled, `W <- W (1 - lr * weight_decay)`.
            project: True or False projects all or none of a group's tensors; None decides as above.
            stacked: read weights of more than two dimensions as batches of matrices (experts) instead of
                flattening all but the first dimension (convolutions).
            storage: format of the state, "parameter" (the parameter's dtype), "fp32" or "bf16", or a mapping from
                "first_moment", "second_moment", "basis", "error" to them.
            stochastic_rounding: write bf16 weights and moments with stochastic rounding.
            nonfinite: what to do when a gradient holds NaN or infinity: "raise" (nothing has changed then), "skip" the
                step (counted in `skipped_steps`), or "ignore" (saves one pass over the gradients and, on
                accelerators, one synchronisation; NaN then spreads).
            seed: from which every random draw derives, together with the parameter's position and step.

    Raises:
        ValueError: for values that are not allowed, naming argument, value and what is allowed.
        TypeError: for options that the recipe does not have.
    """

    recipe: Recipe

    def __init__(self, params: Parameters, **options: Any) -> None:
        self.recipe.check_options(options)
        self.skipped_steps = 0
        self._layouts: dict[Tensor, Layout] = {}
        self._positions: dict[Tensor, int] = {}
        self._compositions: list[tuple[list[Any], Composition]] = []
        super().__init__(params, {**self.recipe.defaults, **options})

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own hyper-parameters override the optimizer's. Duplicates within it count once."""
        given = {key for key in param_group if key not in ("params", "param_names")}
        self.recipe.check_options(dict.fromkeys(given))
        param_group["params"] = _unique(param_group["params"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.recipe.check_group(group)
            composition = self.recipe.compose(group)
            names = group.get("param_names") or [None] * len(group["params"])
            explicit = group["project"] is True or "rank" in given
            for parameter, name in zip(group["params"], names, strict=True):
                projected = self._is_projected(group, composition, parameter, name, explicit)
                self._layouts[parameter] = self._lay_out(group, composition, parameter, name, projected)
                self._positions[parameter] = len(self._compositions)
            if composition.activity is not None:
                composition.activity.check(len(self._projected(group)))
        except Exception:
            self.param_groups.pop()
            for parameter in group["params"]:
                self._layouts.pop(parameter, None)
                self._positions.pop(parameter, None)
            raise
        self._compositions.append((self._snapshot(group), composition))

    def _is_projected(
        self, group: dict[str, Any], composition: Composition, parameter: Tensor, name: str | None, explicit: bool
    ) -> bool:
        has_subspace = composition.finder is not None or composition.activity is not None
        unwanted = group["project"] is False or group.get("rank", 0) is None
        if not has_subspace or unwanted or parameter.dim() < 2 or parameter.numel() == 0:
            return False
        if not explicit and name is not None and not is_projected_by_name(name):
            return False
        if parameter.is_complex():
            if explicit:
                raise ValueError(
                    f"parameter {name or len(self._layouts)} is complex and cannot be projected: "
                    "put it in a group with rank=None"
                )
            return False
        return True

    def _lay_out(
        self, group: dict[str, Any], composition: Composition, parameter: Tensor, name: str | None, projected: bool
    ) -> Layout:
        known = self._layouts.get(parameter)
        index = len(self._layouts) if known is None else known.index
        natural = tuple(torch.view_as_real(parameter).shape if parameter.is_complex() else parameter.shape)
        label = name if name is not None else str(index)
        if not projected:
            plain = Layout(index, label, natural, natural)
            if composition.parts_for(plain).elementwise:
                return plain
            view = matrix_view(natural, stacked=group["stacked"]) if natural else (1,)
            return Layout(index, label, natural, view)
        view = matrix_view(natural, stacked=group["stacked"])
        if composition.finder is None:
            return Layout(index, label, natural, view, projected=True)
        m, n = view[-2:]
        side = projection_side(m, n, composition.proj_type, composition.tie)
        chosen = composition.finder.form == "coordinates"
        rank = resolve_rank(m, n, side, composition.rank, coordinates=chosen)
        return Layout(index, label, natural, view, side, rank, projected=True)

    def _projected(self, group: dict[str, Any]) -> list[Tensor]:
        return [parameter for parameter in group["params"] if self._layouts[parameter].projected]

    def _snapshot(self, group: dict[str, Any]) -> list[Any]:
        return [group[name] for name in self.recipe.structure]

    def composition(self, position: int) -> Composition:
        """The parts of a param group, rebuilt when its hyper-parameters have changed (by a scheduler, say).

        Raises:
            ValueError: if the change would alter the layout or the state of a parameter (rank, side, storage, ...).
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
            layout = self._lay_out(group, new, parameter, old.name, old.projected)
            before, after = composition.parts_for(old), new.parts_for(layout)
            same_state = before.declarations(old) == after.declarations(layout)
            if layout != old or not same_state or composition.storage != new.storage:
                changed = [
                    f"{name} from {was!r} to {now!r}"
                    for name, was, now in zip(self.recipe.structure, snapshot, current, strict=True)
                    if was != now
                ]
                raise ValueError(
                    f"{', '.join(changed)}: this changes the state of parameter {old.name!r} in the middle of a run; "
                    "build a new optimizer instead"
                )
        self._compositions[position] = (current, new)
        return new

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one optimization step.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: a gradient is not finite and `nonfinite="raise"`; weights and state are untouched.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compositions = [self.composition(position) for position in range(len(self.param_groups))]
        if not self._gradients_are_usable():
            self.skipped_steps += 1
            return loss
        work = Workspace()
        largest = max((layout.natural_size for layout in self._layouts.values()), default=0)
        for group, parts in zip(self.param_groups, compositions, strict=True):
            for bucket, plain in self._plain_buckets(group, parts):
                self._update(bucket, plain, group, work)
            active, idle = self._activity(group, parts)
            for bucket in self._buckets(active, group, parts, largest):
                self._update(bucket, parts, group, work)
            for bucket in self._buckets(idle, group, parts, largest):
                self._update_idle(bucket, parts, group, work)
        return loss

    def _update(self, bucket: Bucket, parts: Composition, group: dict[str, Any], work: Workspace) -> None:
        """The step of one bucket: refresh, transport, project, inner, output, apply."""
        work.release()
        gradient, weight = bucket.gather(bucket.gradients, work), bucket.gather(bucket.weights, work)
        state = bucket.load()
        lr = self._learning_rate(group, parts, weight, bucket.layout)
        rate = 1.0 if parts.clip_rms is not None else lr * parts.lr_scale
        if parts.normaliser is not None:
            gradient = parts.normaliser.normalise(gradient, state, bucket.step, work)
        if "error" in state:
            gradient = torch.add(gradient, state["error"], out=work.like(gradient))

        subspace: Subspace | None = None
        coordinates, momentum_loss, refreshed = gradient, None, False
        if parts.finder is not None:
            subspace, momentum_loss, refreshed = self._subspace(bucket, parts, group, gradient, state)
            shape = (*gradient.shape[: gradient.dim() - len(bucket.layout.view)], *bucket.layout.coordinates)
            coordinates = subspace.project(gradient, out=work.take(shape, gradient.dtype, gradient.device))

        direction = parts.inner.update(coordinates, state, bucket.age, rate, work)
        update = Update(direction.value, direction.step)
        if subspace is not None:
            scene = Scene(
                gradient, coordinates, direction, subspace, bucket.layout, state, parts.inner, rate, momentum_loss, work
            )
            update = parts.output.form(scene, parts.remainder)
        apply_update(weight, update, gradient, subspace, lr, group["weight_decay"], parts, work)

        stochastic = group["stochastic_rounding"]
        bucket.write_weights(weight, group["seed"], stochastic)
        bucket.commit(state, bases=refreshed, seed=group["seed"], stochastic=stochastic)
        for stored in bucket.states:
            stored["step"] = bucket.step

    def _subspace(
        self, bucket: Bucket, parts: Composition, group: dict[str, Any], gradient: Tensor, state: dict[str, Any]
    ) -> tuple[Subspace, Tensor | None, bool]:
        """The subspace of this step, found anew if due; what the momentum lost by that; whether it was found."""
        finder, layout, inner = parts.finder, bucket.layout, parts.inner
        assert finder is not None
        first = state["refreshed"][0] == 0
        previous = None if first else finder.unpack(state, layout, gradient.dtype, gradient.device)
        due = bucket.due
        if previous is not None and not due:
            due = parts.refresh.drifted(gradient, previous, state.get("captured"), bucket.step)
        # A zero gradient carries no subspace: keep the old one and look again at the next step.
        blank = finder.reads_gradient and due and not bool(gradient.any())
        if previous is not None and (not due or blank):
            return previous, None, False

        lifted = None
        if previous is not None and (finder.reads_momentum or parts.reads_momentum_loss) and bucket.age > 1:
            lifted = previous.lift(state[inner.first_moment])
        momentum = None
        if lifted is not None and finder.reads_momentum:
            momentum = lifted * inner.momentum_correction(bucket.age - 1)
        seeds = bucket.seeds(group["seed"], FIND)
        sight = Sight(gradient, layout, bucket.layouts, previous, momentum, seeds, state, bucket.step)
        found = finder.find(sight)
        del momentum
        if previous is not None:
            self._transport(bucket, parts, state, previous, found)
            if lifted is not None and parts.reads_momentum_loss:
                lifted = found.add_lift_(lifted, state[inner.first_moment], alpha=-1.0)
            else:
                lifted = None
        for name, value in finder.pack(found).items():
            state[name] = value
        if "captured" in state:
            state["captured"].copy_(captured_energy(gradient, found))
        state["refreshed"] = [0 if blank else bucket.step] * len(bucket.states)
        return found, lifted, True

    def _transport(
        self, bucket: Bucket, parts: Composition, state: dict[str, Any], previous: Subspace, found: Subspace
    ) -> None:
        if parts.transport.restarts:
            for declared in parts.inner.declare(bucket.layout):
                state[declared.name].zero_()
            state["restarted"] = [bucket.step - 1] * len(bucket.states)
            bucket.age = 1
        elif parts.transport.moves and bucket.age > 1:
            change = found.change_from(previous)
            side = bucket.layout.side
            assert side is not None
            parts.transport.apply(parts.inner, state, change, side, bucket.age - 1)

    def _update_idle(self, bucket: Bucket, parts: Composition, group: dict[str, Any], work: Workspace) -> None:
        """The step of tensors that are not active in this period: the stateless rule on the whole gradient."""
        work.release()
        gradient, weight = bucket.gather(bucket.gradients, work), bucket.gather(bucket.weights, work)
        lr = self._learning_rate(group, parts, weight, bucket.layout)
        update = Update()
        if isinstance(parts.remainder, Stateless):
            update = parts.remainder.idle(gradient, lr * parts.lr_scale, work)
        apply_update(weight, update, gradient, None, lr, group["weight_decay"], parts, work)
        bucket.write_weights(weight, group["seed"], group["stochastic_rounding"])
        for stored in bucket.states:
            stored["step"] = bucket.step

    def _learning_rate(
        self, group: dict[str, Any], parts: Composition, weight: Tensor, layout: Layout
    ) -> float | Tensor:
        lr = float(group["lr"])
        if parts.parameter_scale is None:
            return lr
        dims = (-2, -1) if layout.is_matrix else (-1,)
        rms = weight.square().mean(dims, keepdim=True).sqrt_()
        return rms.clamp_(min=parts.parameter_scale).mul_(lr)

    # ------------------------------------------------------------------ buckets

    def _gradients_are_usable(self) -> bool:
        """Check all gradients before anything changes; False means that the step is to be skipped."""
        sums: dict[torch.device, list[Tensor]] = {}
        checked = []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise RuntimeError(
                        f"parameter {self._layouts[parameter].name!r} has a sparse gradient: use sparse=False in its "
                        "embedding, or torch.optim.SparseAdam for it"
                    )
                if group["nonfinite"] != "ignore":
                    # A sum is finite unless an entry is not (float16 could overflow, so it is widened).
                    wide = torch.float32 if gradient.dtype == torch.float16 else None
                    sums.setdefault(gradient.device, []).append(gradient.sum(dtype=wide).abs().float())
                    checked.append((parameter, group["nonfinite"]))
        if all(bool(torch.stack(values).isfinite().all()) for values in sums.values()):
            return True
        for parameter, policy in checked:
            if parameter.grad.isfinite().all():
                continue
            if policy == "raise":
                raise FloatingPointError(
                    f"the gradient of parameter {self._layouts[parameter].name!r} holds NaN or infinity; no weight "
                    "was changed. Lower the learning rate, clip gradients, or pass nonfinite='skip'"
                )
            return False
        return True

    def _plain_buckets(
        self, group: dict[str, Any], composition: Composition
    ) -> Iterator[tuple[Bucket, Composition]]:
        """Buckets of the unprojected parameters; those that one fused kernel can update are updated here."""
        fused: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            layout = self._layouts[parameter]
            if parameter.grad is None or layout.projected:
                continue
            parts = composition.parts_for(layout)
            state = self._state_of(parameter, parts, group)
            weight, gradient = _real(parameter), _real(parameter.grad)
            bucket = Bucket([weight], [gradient], [state], [layout], state["step"] + 1, state["step"] + 1)
            if isinstance(parts.inner, Adam) and parts.elementwise and _is_native(bucket):
                key = (parts.inner, weight.dtype, weight.device, state["step"])
                fused.setdefault(key, []).append(parameter)
            elif parts.elementwise:
                for piece in pieces(bucket, PIECE):
                    yield piece, parts
                state["step"] = bucket.step
            else:
                yield bucket, parts
        for (inner, _, _, step), parameters in fused.items():
            states = [self.state[parameter] for parameter in parameters]
            inner.step_weights(
                [_real(parameter) for parameter in parameters],
                [_real(parameter.grad) for parameter in parameters],  # type: ignore[arg-type]
                states,
                step + 1,
                float(group["lr"]),
                group["weight_decay"],
            )
            for state in states:
                state["step"] = step + 1

    def _buckets(
        self, parameters: list[Tensor], group: dict[str, Any], parts: Composition, largest: int
    ) -> Iterator[Bucket]:
        """Equal parameters in batches that together are no larger than the largest parameter.

        On the CPU a large matrix gains nothing from a batch, which would only copy it.
        """
        alike: dict[tuple[Any, ...], list[tuple[Tensor, Layout, dict[str, Any]]]] = {}
        projected = self._projected(group) if parts.finder is not None else []
        positions = {parameter: position for position, parameter in enumerate(projected)}
        for parameter in parameters:
            layout, state = self._layouts[parameter], self._state_of(parameter, parts, group)
            step = state["step"] + 1
            due = False
            if parts.finder is not None:
                due = state["refreshed"] < parts.refresh.scheduled(step, positions[parameter], len(projected))
            key = (
                (layout.view, layout.side, layout.rank, parameter.dtype, parameter.device, parameter.grad.dtype)
                + (step, step - state.get("restarted", 0), due, state.get("refreshed", 1) == 0)
            )  # fmt: skip
            alike.setdefault(key, []).append((parameter, layout, state))
        for key, members in alike.items():
            step, age, due, _ = key[-4:]
            size = members[0][1].natural_size
            large = key[4].type == "cpu" and size >= SMALL
            length = 1 if large else max(1, largest // size)
            for start in range(0, len(members), length):
                chosen = members[start : start + length]
                yield Bucket(
                    [parameter for parameter, _, _ in chosen],
                    [parameter.grad for parameter, _, _ in chosen],  # type: ignore[misc]
                    [state for _, _, state in chosen],
                    [layout for _, layout, _ in chosen],
                    step,
                    age,
                    due,
                )

    def _activity(self, group: dict[str, Any], parts: Composition) -> tuple[list[Tensor], list[Tensor]]:
        """The projected parameters with a gradient, split into active and idle ones."""
        everyone = self._projected(group)
        ready = [parameter for parameter in everyone if parameter.grad is not None]
        if parts.activity is None or not ready:
            return ready, []
        steps = [self.state[parameter].get("step", 0) for parameter in everyone if parameter in self.state]
        period = max(steps, default=0) // parts.activity.gap
        chosen = parts.activity.active(period, len(everyone))
        active, idle = [], []
        for position, parameter in enumerate(everyone):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if state.get("period") != period:
                # Only active tensors keep moments, and they start afresh with every period.
                step = state.get("step", 0)
                state.clear()
                state.update(step=step, restarted=step, period=period)
                if position in chosen:
                    self._allocate(parameter, parts, state)
            (active if position in chosen else idle).append(parameter)
        return active, idle

    # ------------------------------------------------------------------ state

    def _state_of(self, parameter: Tensor, parts: Composition, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, allocated as its parts declare it on first use."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            if parts.finder is not None:
                state["refreshed"] = 0
                if parts.transport.restarts:
                    state["restarted"] = 0
                if parts.finder.form == "seeded":
                    state["seed"] = group["seed"] + self._layouts[parameter].index + 1
            self._allocate(parameter, parts, state)
        return state

    def _allocate(self, parameter: Tensor, parts: Composition, state: dict[str, Any]) -> None:
        layout = self._layouts[parameter]
        for declared in parts.declarations(layout):
            shape = layout.shape(declared.shape)
            dtype = parts.storage.dtype(declared, parameter.dtype)
            if shape == layout.natural and not parameter.is_complex():
                tensor = torch.zeros_like(parameter, dtype=dtype)
            else:
                tensor = torch.zeros(shape, dtype=dtype, device=parameter.device)
            if declared.fill == "parameter":
                tensor.copy_(parameter)
            elif declared.fill:
                tensor.fill_(declared.fill)
            state[declared.name] = tensor

    def layout_of(self, parameter: Tensor) -> Layout:
        """How a parameter is seen: side, rank, shapes."""
        return self._layouts[parameter]

    def parts_of(self, parameter: Tensor) -> Composition:
        """The composition that updates a parameter."""
        return self.composition(self._positions[parameter]).parts_for(self._layouts[parameter])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with plain tensors, numbers and text only: loads with `weights_only=True`."""
        return checkpoint.plain(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; training continues bit for bit.

        Raises:
            ValueError: for a checkpoint of another method, other parameters or another rank; nothing is changed then.
        """
        checkpoint.load(self, state_dict)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the optimizer's tensors by kind ("first_moment", "basis", ...), and their "total"."""
        return listing.state_bytes(self)

    def summary(self) -> str:
        """A table with parameter, shape, side, rank and state bytes."""
        return listing.summary(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies."""
        kept = ("skipped_steps", "_layouts", "_positions", "_compositions")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}


def _unique(parameters: Any) -> list[Any]:
    """The parameters (or named ones) in order, each once: tied weights are updated once."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, set):
        raise TypeError("parameters must be in an order that is the same in every run; got a set")
    seen: dict[int, Any] = {}
    for item in parameters:
        seen.setdefault(id(item[1] if isinstance(item, tuple) else item), item)
    return list(seen.values())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _is_native(bucket: Bucket) -> bool:
    """Whether weight, gradient and state share one full-precision dtype, as the fused kernel wants them."""
    tensors = [bucket.weights[0], bucket.gradients[0]]
    tensors += [value for value in bucket.states[0].values() if isinstance(value, Tensor)]
    same = all(tensor.dtype == bucket.dtype and tensor.stride() == tensors[0].stride() for tensor in tensors)
    return same and not any(tensor.dtype == torch.bfloat16 for tensor in tensors)
