"""The engine: one torch.optim.Optimizer that runs every recipe.

    bucket -> (refresh -> transport) -> project -> inner -> output -> apply

`SubspaceOptimizer._update` is that line as code. `groups` decides what is projected, `collect` what
belongs into a bucket and the state it has, `checkpoint` what may be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim import checkpoint, listing, sharded_state
from subspan.optim.apply import apply_update, root_mean_square
from subspan.optim.backward import BackwardUpdates, Clipping
from subspan.optim.bucket import Bucket
from subspan.optim.collect import assignments, buckets, gradients_are_usable
from subspan.optim.composition import Composition
from subspan.optim.factored import step_in_rows, steps_in_rows
from subspan.optim.parts.scene import Scene, Seen, Update
from subspan.optim.parts.workspace import Workspace
from subspan.optim.refreshing import follow, look
from subspan.optim.resizing import adapt_ranks
from subspan.optim.resting import follow_activity
from subspan.optim.roster import Parameters, Roster

Plan = list[tuple[dict[str, Any], Composition, list[Tensor]]]


class SubspaceOptimizer(Roster):
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
            refresh: None keeps the method's policy; "staggered", "lazy", "drift", or a policy.
            storage: format of the state ("parameter", "fp32", "bf16", "int8", "int4", ...; see
                `parts/storage.py`), or a mapping from "first_moment", "second_moment", "basis",
                "error" to formats.
            stochastic_rounding: write bf16 weights and moments, and int8 weights, with stochastic
                rounding.
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

    def __init__(self, params: Parameters, **options: Any) -> None:
        self.skipped_steps = 0
        self._backward: BackwardUpdates | None = None
        super().__init__(params, **options)

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
                for ready in (
                    [own] if self.sharding is None else self.sharding.presented(own, group, parts)
                ):
                    for bucket in buckets(self, ready, group, parts, self._largest):
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
            members = [p for other, own in concluding if other == inner for p in own]
            if self.sharding is not None:
                self.sharding.sum_scalars(members)
            inner.conclude([self.state[p] for p in members])
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
        state = bucket.load()
        if steps_in_rows(parts, bucket.layout):
            weight = bucket.gather(bucket.weights, work)
            lr = self._learning_rate(group, parts, weight)
            step_in_rows(bucket, weight, state, group, parts, lr, work)
            self._commit(bucket, group, weight, state, False)
            return
        seen = look(bucket, parts, group, state, work)
        # Only now: a refresh needs the memory that a copy of the weight would take.
        weight = bucket.gather(bucket.weights, work)
        lr = self._learning_rate(group, parts, weight)
        rate = 1.0 if parts.clip_rms is not None else lr * parts.lr_scale
        rate = rate * parts.inner.shape_factor(bucket.layout)
        if parts.elementwise and _takes_kernel(parts, bucket.age, weight, seen, state):
            decay = group["weight_decay"]
            assert isinstance(rate, float)
            parts.inner.step_weights(
                [weight], [seen.gradient], [state], bucket.age, float(group["lr"]), decay, rate
            )
            self._commit(bucket, group, weight, state, False)
            return

        direction = parts.inner.update(seen.coordinates, state, bucket.age, rate, work)
        # What follows overwrites the direction, but for a plain step, which only reads it.
        kept = seen.subspace is None and parts.clip_rms is None and isinstance(rate, float)
        if not direction.scratch and not kept:
            direction.value = work.like(direction.value).copy_(direction.value)
        update = Update(direction.value, direction.step)
        if seen.subspace is not None:
            scene = Scene(
                seen, direction, bucket.layout, state, parts.inner, rate, work, bucket.sharding
            )
            update = parts.output.form(scene, parts.remainder)
        apply_update(weight, update, seen, state, lr, group["weight_decay"], parts, work)

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
        own = super().state_dict()
        if self.sharding is not None and self.sharding.group is not None:
            own = sharded_state.spread(self, own)
        return checkpoint.plain(own)

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
            "sharding",
        )
        own = {name: getattr(self, name) for name in kept}
        return {**super().__getstate__(), **own, "_backward": None}


def _takes_kernel(
    parts: Composition, age: int, weight: Tensor, seen: Seen, state: dict[str, Any]
) -> bool:
    """Whether a fused kernel may walk through weight, gradient and moments alike."""
    if not parts.inner.can_step_weights(age):
        return False
    moments = [value for value in state.values() if isinstance(value, Tensor)]
    return all(tensor.is_contiguous() for tensor in (weight, seen.gradient, *moments))
