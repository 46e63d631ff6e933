"""What the subspaces of a run do: one JSON line per recorded refresh of a projected parameter.

At a refresh, with B_old and B the orthonormal bases before and after the step and G the gradient of
that step as the backward pass left it,

    overlap         ||B_oldᵀ B||_F² / r                  1: the subspace stayed, r / d: no relation
    energy          ||project(G)||² / ||G||²             share of the gradient inside the subspace
    effective_rank  exp(-Σ p_i log p_i), p = σ / Σ σ     σ: singular values of project(G)

The effective rank is that of "The effective rank: a measure of effective dimensionality" (Roy and
Vetterli, 2007); the singular values come from the small Gram matrix of the coordinates. Methods
whose subspace moves in every step are looked at as if every step were a refresh.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerState, TrainingArguments

from subspan.linalg import orthonormalise
from subspan.optim.collect import refresh_is_due
from subspan.optim.composition import Composition
from subspan.optim.parts.refresh import Refresh
from subspan.subspaces import Dense, OneSided, Subspace, TwoSided, captured_energy
from subspan.train.metrics import Line, keep_metrics

if TYPE_CHECKING:
    from subspan.optim import SubspaceOptimizer

SUBSPACES = "subspaces.jsonl"
"""File of the run folder."""

MEASURES = ("overlap", "energy", "effective_rank")

_LEAST_SPACING, _MOST_RECORDINGS = 10, 100


def spacing(total_steps: int) -> int:
    """Least number of steps between two recordings of one parameter.

    At most a hundred recordings per run, and at most one in ten steps, which keeps the cost at a
    few percent also for methods that refresh in every step.
    """
    return max(_LEAST_SPACING, math.ceil(total_steps / _MOST_RECORDINGS))


def effective_rank(coordinates: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of (..., a, b) matrices: shape (...).

    Between 1 and min(a, b); of a zero matrix 0.
    """
    x = coordinates.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def measure(gradient: Tensor, subspace: Subspace, previous: Subspace | None) -> Tensor:
    """The three MEASURES of one parameter as float64; NaN where one is not defined.

    Args:
        gradient: (..., m, n), or the natural shape for subspaces with a basis per mode.
        subspace: after the refresh.
        previous: before it; none at the first one.

    Returns:
        (3,); the mean over the matrices of a stack.
    """
    undefined = torch.full((), math.nan, dtype=torch.float64, device=gradient.device)
    overlap = rank = undefined
    if previous is not None:
        try:
            overlap = subspace.overlap(previous).double().mean()
        except TypeError:
            overlap = undefined
    if isinstance(subspace, OneSided) and not subspace.orthonormal:
        subspace = Dense(subspace.side, orthonormalise(subspace.dense()))
    if subspace.orthonormal:
        energy = captured_energy(gradient, subspace).double().mean()
    else:
        energy = undefined
    if isinstance(subspace, OneSided | TwoSided):
        rank = effective_rank(subspace.project(gradient)).mean()
    return torch.stack([overlap.to(gradient.device), energy, rank])


@dataclass
class _Before:
    """What a step is about to change or free."""

    gradient: Tensor
    previous: Subspace | None


class SubspaceRecorder(TrainerCallback):
    """Writes subspaces.jsonl during `Trainer.train`; see the module.

    Lines hold step, name, shape, rank, overlap, energy and effective_rank (null where not defined).
    A parameter is recorded at a refresh that is at least `spacing` steps after its last recorded
    one. A resumed run drops the lines after its checkpoint and goes on as if never interrupted.
    Works with updates inside the backward pass too, in one process.

    Args:
        path: the file.
        tell: called with one line of text if the method has no subspaces; there is no file then.
        listeners: called after every recorded step with the mean of each measure over the layers
            that were recorded, as a line with step, overlap, energy and effective_rank.
    """

    def __init__(
        self,
        path: Path,
        tell: Callable[[str], Any] = print,
        listeners: Sequence[Callable[[Line], Any]] = (),
    ) -> None:
        self._path, self._tell, self._listeners = path, tell, listeners
        self._file: TextIO | None = None
        self._watched: list[Tensor] = []
        self._last: dict[str, int] = {}
        self._before: dict[Tensor, _Before] = {}
        self._found: dict[Tensor, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._optimizer: SubspaceOptimizer
        self._spacing = self._step = 0

    # ------------------------------------------------------------------ events of the Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **given: Any
    ) -> None:
        optimizer = given["optimizer"]
        self._optimizer = optimizer = getattr(optimizer, "optimizer", optimizer)
        groups = range(len(optimizer.param_groups))
        if not any(_has_finder(optimizer.composition(position)) for position in groups):
            self._tell(
                f"{optimizer.recipe.title} has no subspaces, so there is no {self._path.name}"
            )
            return
        self._watched = [p for g in optimizer.param_groups for p in optimizer.projected(g)]
        self._spacing = spacing(state.max_steps)
        kept = keep_metrics(self._path, state.global_step)
        self._last = {line["name"]: line["step"] for line in kept}
        self._file = self._path.open("a", encoding="utf-8")
        if optimizer._backward is not None:
            # The optimizer's own hooks were registered earlier, so `_updated` comes after them.
            for parameter in self._watched:
                self._handles.append(parameter.register_hook(self._arrival(parameter)))
                hook = parameter.register_post_accumulate_grad_hook(self._updated)
                self._handles.append(hook)

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._step = state.global_step + 1

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for parameter in self._watched:
            if parameter.grad is not None and self._is_candidate(parameter):
                self._before[parameter] = self._look(parameter, parameter.grad)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for parameter in list(self._before):
            self._measure(parameter)
        self._write()

    def on_save(self, *_: Any, **__: Any) -> None:
        # A checkpoint must not outlive the lines before it.
        if self._file is not None:
            os.fsync(self._file.fileno())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let go of the parameters; a training that ends well does it itself."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    # ------------------------------------------------------------------ one parameter

    def _arrival(self, parameter: Tensor) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if self._is_candidate(parameter):
                self._before[parameter] = self._look(parameter, gradient)

        return look

    def _updated(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            self._measure(parameter)
        else:  # It waits for the step, whose events see all of it.
            self._before.pop(parameter, None)

    def _is_candidate(self, parameter: Tensor) -> bool:
        """Whether the coming step may refresh the subspace, and long enough after the last time."""
        optimizer = self._optimizer
        last = self._last.get(optimizer.layout_of(parameter).name)
        if last is not None and self._step - last < self._spacing:
            return False
        parts = optimizer.parts_of(parameter)
        if parts is None or parts.finder is None:
            return False
        state = optimizer.state.get(parameter, {})
        if parts.finder.follows or not state.get("refreshed"):
            return True
        if type(parts.refresh).drifted is not Refresh.drifted:
            return True
        return refresh_is_due(optimizer, parameter, parts, state)

    @torch.no_grad()
    def _look(self, parameter: Tensor, gradient: Tensor) -> _Before:
        if not self._optimizer.state.get(parameter):
            return _Before(gradient, None)
        held = self._optimizer.state[parameter].values()
        stores = {value.data_ptr() for value in held if isinstance(value, Tensor)}
        previous = self._optimizer.subspace_of(parameter)
        return _Before(gradient, None if previous is None else _own(previous, stores))

    @torch.no_grad()
    def _measure(self, parameter: Tensor) -> None:
        before = self._before.pop(parameter, None)
        parts, state = self._optimizer.parts_of(parameter), self._optimizer.state.get(parameter, {})
        if before is None or parts is None or parts.finder is None:
            return
        if not parts.finder.follows and state.get("refreshed") != state.get("step"):
            return
        subspace = self._optimizer.subspace_of(parameter)
        if subspace is not None:
            gradient = before.gradient.reshape(self._optimizer.layout_of(parameter).view)
            self._found[parameter] = measure(gradient, subspace, before.previous)

    def _write(self) -> None:
        """Write the lines of this step."""
        found, self._found = self._found, {}
        if not found or self._file is None:
            return
        rows = torch.stack(list(found.values())).tolist()  # The step's one transfer to the host.
        sums: dict[str, list[float]] = {name: [] for name in MEASURES}
        for parameter, row in zip(found, rows, strict=True):
            layout = self._optimizer.layout_of(parameter)
            line: Line = {"step": self._step, "name": layout.name}
            line |= {"shape": list(layout.natural), "rank": layout.rank}
            for name, value in zip(MEASURES, row, strict=True):
                line[name] = round(value, 6) if math.isfinite(value) else None
                sums[name] += [value] if math.isfinite(value) else []
            self._last[layout.name] = self._step
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        means = {name: sum(values) / len(values) for name, values in sums.items() if values}
        for listener in self._listeners:
            listener({"step": self._step} | means)


def _has_finder(parts: Composition | None) -> bool:
    if parts is None:
        return False
    return parts.finder is not None or _has_finder(parts.idle) or _has_finder(parts.tensors)


def _own(subspace: Subspace, stores: set[int]) -> Subspace:
    """The subspace with copies of the tensors that are the optimizer's state."""

    def copy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copy, value))
        if isinstance(value, Tensor) and value.data_ptr() in stores:
            return value.clone()
        return value

    held: Any = subspace
    return replace(held, **{item.name: copy(getattr(held, item.name)) for item in fields(held)})
