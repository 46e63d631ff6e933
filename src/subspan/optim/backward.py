"""Updates inside the backward pass: gradients that never exist all at once.

LOMO (Lv et al. 2023, arXiv 2306.09782) and GaLore's per-layer mode free each gradient as soon as it
has been used. Here that works for every method, and together with

- gradient accumulation: instead of gradients their coordinates are summed, in the subspace in force
  (Flora, Hao et al. 2024, arXiv 2402.03293, generalised to every basis that stays for some steps);
- clipping by the norm of all gradients, for which updates wait until the end of the pass while only
  coordinates are kept.

With one pass per step and no clipping, everything is updated at once. With accumulation, or
clipping by a common norm, coordinates of projected matrices and gradients of all else are kept, and
`step()` updates from them.

A matrix whose subspace is due for a refresh keeps its gradient until `step()`: the finder needs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from subspan.linalg import compute_dtype
from subspan.optim.bucket import Bucket
from subspan.optim.collect import bad_gradient, gradients_are_usable, refresh_is_due
from subspan.optim.composition import Composition
from subspan.optim.parts.workspace import Workspace
from subspan.optim.rowwise import RowwiseUpdates
from subspan.subspaces.bases import OneSided, Subspace
from subspan.subspaces.ranks import EnergyRank

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer

Clipping = Literal["whole", "inside", "each"]

# Parameter -> what updates it in its backward pass, over all optimizers.
_ATTACHED = WeakTensorKeyDictionary()


class BackwardUpdates:
    """The hooks of one optimizer; made by `SubspaceOptimizer.attach_to_backward`.

    Weights after `step()` equal those of ordinary steps up to rounding, except that

    - with accumulation and `clipping="inside"` the norm is that of what the subspaces hold of the
      summed gradients (and all of every gradient that is not projected);
    - `clipping="each"` clips every parameter by its own norm;
    - `lifted=True` loses what lies outside the subspace.

    Where ordinary steps need a gradient that this mode does not keep, it is refused.
    """

    def __init__(
        self,
        optimizer: SubspaceOptimizer,
        model: nn.Module | None,
        accumulation_steps: int,
        max_norm: float | None,
        clipping: Clipping,
        lifted: bool,
    ) -> None:
        check_attachable(optimizer, accumulation_steps, max_norm, clipping, lifted)
        self._optimizer = optimizer
        self._max_norm, self._clipping = max_norm, clipping
        self._waits = _waits(accumulation_steps, max_norm, clipping)
        self._work = Workspace()
        self._done: list[Tensor] = []
        self._sums: dict[Tensor, Tensor] = {}
        self._squares: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._rowwise = RowwiseUpdates(optimizer, self._done)
        try:
            for parameter in self._parameters():
                self._attach(parameter)
        except Exception:
            self.detach()
            raise
        if model is not None and not self._waits and max_norm is None:
            self._rowwise.attach(model)

    # ------------------------------------------------------------------ attaching

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self._optimizer.param_groups for p in group["params"])

    def _attach(self, parameter: Tensor) -> None:
        if parameter in _ATTACHED:
            name = self._optimizer.layout_of(parameter).name
            raise RuntimeError(
                f"parameter {name!r} is already updated in its backward pass: call detach() on the "
                "handle that attach_to_backward returned before attaching again"
            )
        # Hooks can only be registered on what requires a gradient; some methods turn it off and on.
        wanted = parameter.requires_grad
        parameter.requires_grad_(True)
        self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived))
        parameter.requires_grad_(wanted)
        _ATTACHED[parameter] = self

    def detach(self) -> None:
        """Return to ordinary steps; what was accumulated is forgotten."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rowwise.detach()
        for parameter in self._parameters():
            if _ATTACHED.get(parameter) is self:
                del _ATTACHED[parameter]
        self.forget()
        if self._optimizer._backward is self:
            self._optimizer._backward = None

    # ------------------------------------------------------------------ the backward pass

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        optimizer, gradient = self._optimizer, parameter.grad
        if gradient is None:  # updated by rows
            return
        if self._waits:
            self._keep_coordinates(parameter)
            return
        if self._max_norm is not None:
            gradient.mul_(_factor(torch.linalg.vector_norm(gradient), self._max_norm))
        plan = optimizer.plan([parameter])
        gradients_are_usable(optimizer, plan)
        optimizer.update_all(plan, self._work)
        parameter.grad = None
        self._done.append(parameter)

    def _keep_coordinates(self, parameter: Tensor) -> None:
        """Project the gradient, add it to the sum and free it; where impossible, leave it."""
        seen = self._bucket(parameter)
        if seen is None:
            return
        bucket, parts = seen
        self._work.release()
        gradient = bucket.gather([parameter.grad], self._work)  # type: ignore[list-item]
        coordinates = self._subspace(bucket, parts).project(gradient)
        if self._max_norm is not None and self._clipping == "whole":
            self._squares.append(_square(gradient))
        if parameter in self._sums:
            self._sums[parameter] += coordinates
        else:
            self._sums[parameter] = coordinates
        parameter.grad = None

    def _bucket(self, parameter: Tensor) -> tuple[Bucket, Composition] | None:
        return steady(self._optimizer, parameter)

    def _subspace(self, bucket: Bucket, parts: Composition) -> Subspace:
        assert parts.finder is not None
        return parts.finder.unpack(bucket.load(), bucket.layout, bucket.dtype, bucket.device)

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def finish(self) -> None:
        """End the step: update what has waited, and draw conclusions for whole groups."""
        optimizer = self._optimizer
        rest = [p for p in self._parameters() if p.grad is not None]
        waiting = list(self._sums)
        self._clip(rest)
        plan = optimizer.plan(rest)
        gradients_are_usable(optimizer, plan)
        optimizer.update_all(plan, self._work)
        for parameter, total in self._sums.items():
            self._update_from(parameter, total)
        members = {id(p): p for p in (*self._done, *rest, *waiting)}
        optimizer.conclude(list(members.values()))
        for parameter in rest:
            parameter.grad = None
        self.forget()

    def _clip(self, rest: list[Tensor]) -> None:
        if self._max_norm is None or not self._waits:
            return
        squares = self._squares + [_square(p.grad) for p in rest if p.grad is not None]
        if self._clipping == "inside":
            squares += [self._inside(*item) for item in self._sums.items()]
        if not squares:
            return
        device = squares[0].device
        total = torch.stack([square.to(device) for square in squares]).sum().sqrt()
        factor = _factor(total, self._max_norm)
        for tensor in (*(p.grad for p in rest), *self._sums.values()):
            if tensor is not None:
                tensor.mul_(factor.to(tensor.device, tensor.dtype))

    def _inside(self, parameter: Tensor, coordinates: Tensor) -> Tensor:
        """Squared norm of lifted coordinates."""
        seen = self._bucket(parameter)
        assert seen is not None
        subspace = self._subspace(*seen)
        if subspace.orthonormal or not isinstance(subspace, OneSided):
            return _square(coordinates)
        basis = subspace.dense(coordinates.dtype)
        left = subspace.side == "left"
        gram = basis.mT @ basis
        return ((gram @ coordinates if left else coordinates @ gram) * coordinates).sum().double()

    def _update_from(self, parameter: Tensor, coordinates: Tensor) -> None:
        """Update a parameter from the coordinates of its gradient."""
        optimizer = self._optimizer
        seen = self._bucket(parameter)
        assert seen is not None
        bucket, parts = seen
        if not math.isfinite(coordinates.sum().item()):
            raise bad_gradient(bucket.layout.name)
        if parts.needs_whole_gradient is None:
            bucket.coordinates = [coordinates]
            optimizer.update_bucket(parameter, bucket, parts, self._work)
            return
        lifted = self._subspace(bucket, parts).lift(coordinates)
        parameter.grad = lifted.reshape(parameter.shape).to(parameter.dtype)
        optimizer.update_all(optimizer.plan([parameter]), self._work)
        parameter.grad = None

    def forget(self) -> None:
        """Drop what was accumulated."""
        self._sums.clear()
        self._squares.clear()
        self._done.clear()
        self._work = Workspace()


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype)).square().double()


def _factor(norm: Tensor, limit: float) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_."""
    return (limit / (norm + 1e-6)).clamp_(max=1.0)


def _waits(accumulation_steps: int, max_norm: float | None, clipping: Clipping) -> bool:
    """Whether updates wait for `step()`."""
    return accumulation_steps != 1 or (max_norm is not None and clipping != "each")


def steady(optimizer: SubspaceOptimizer, parameter: Tensor) -> tuple[Bucket, Composition] | None:
    """The bucket of a matrix whose subspace stays in the coming step; None for all others."""
    layout, parts = optimizer.layout_of(parameter), optimizer.parts_of(parameter)
    state = optimizer.state[parameter]
    usable = parts is not None and layout.projected and parts.finder is not None
    if parts is None or not usable or not state.get("refreshed"):
        return None
    if "period" in state:  # of an activity, whose next one starts from a whole gradient
        return None
    if refresh_is_due(optimizer, parameter, parts, state):
        return None
    step = state["step"] + 1
    age = step - state.get("restarted", 0)
    codecs = parts.codecs(layout)
    return Bucket([parameter], [], [state], [layout], step, age, codecs=codecs), parts


def check_attachable(
    optimizer: SubspaceOptimizer,
    accumulation_steps: int = 1,
    max_norm: float | None = None,
    clipping: Clipping = "whole",
    lifted: bool = False,
) -> None:
    """Refuse what cannot be done in the backward pass; arguments as for `attach_to_backward`.

    Raises:
        ValueError: for arguments, or a method, that it does not allow.
        RuntimeError: with several processes.
    """
    if optimizer.sharding is not None:
        raise ValueError(
            "the parameters are sharded, and an update in the backward pass would need their "
            "gradients in the same order on every rank: take ordinary steps, for which FSDP2 keeps "
            "sharded gradients only"
        )
    steps = accumulation_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"accumulation_steps={steps!r} must be an integer of at least 1")
    if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm={max_norm!r} must be a positive number, or None")
    if clipping not in get_args(Clipping):
        raise ValueError(f"clipping={clipping!r} must be whole, inside or each")
    if steps > 1 and max_norm is not None and clipping != "inside":
        raise ValueError(
            f"clipping={clipping!r} with accumulation_steps={steps}: the summed gradients are not "
            "kept, only their coordinates, so their norm is not known; use clipping='inside', the "
            "norm of what the subspaces hold"
        )
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    if started and distributed.get_world_size() > 1:
        raise RuntimeError(
            "attach_to_backward works in one process: gradients of several processes are averaged "
            "only after the hooks have run"
        )
    for group in optimizer.param_groups:
        if group["nonfinite"] == "skip":
            raise ValueError(
                "nonfinite='skip' checks all gradients before any update, and in the backward pass "
                "they never exist together: use 'raise' or 'ignore'"
            )
        rank = group.get("rank")
        if isinstance(rank, EnergyRank) and rank.budget is not None:
            raise ValueError(
                "rank=EnergyRank(budget=...) compares the gradients of all matrices, and in the "
                "backward pass they never exist together: give no budget"
            )
    if not _waits(steps, max_norm, clipping) or lifted:
        return
    remedy = "use clipping='each', or clip without hooks"
    if steps > 1:
        remedy = "use lifted=True, which runs on the lifted sum, or accumulate without hooks"
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        layout, parts = optimizer.layout_of(parameter), optimizer.parts_of(parameter)
        reason = parts.needs_whole_gradient if layout.projected and parts is not None else None
        if reason is not None:
            raise ValueError(
                f"parameter {layout.name!r}: {reason}, and only coordinates are kept until the "
                f"step; {remedy}"
            )
