"""Refresh: when a finder runs again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.optim.parts.activity import check_gap
from subspan.subspaces.bases import OneSided, Subspace
from subspan.subspaces.geometry import captured_energy
from subspan.subspaces.layout import Layout, StateDeclaration

State = dict[str, Any]


@dataclass(frozen=True)
class Refresh:
    """Base: refresh once, at the first step, and never again."""

    def scheduled(self, step: int, position: int, count: int, state: Mapping[str, Any]) -> int:
        """The latest step, not after `step`, at which a refresh is planned.

        A refresh is due when the last one was earlier than that, so one that had to be put off (a
        zero gradient carries no subspace) is made up for at the next step.

        Args:
            step: 1-based step of the parameter.
            position: of the parameter among the `count` projected ones of its group.
            count: see `position`.
            state: the parameter's state.
        """
        return 1

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The tensors that the policy itself needs."""
        return ()

    def counters(self) -> State:
        """The numbers and lists that it keeps per parameter, at their start."""
        return {}

    def drifted(self, gradient: Tensor, subspace: Subspace, state: State, step: int) -> bool:
        """Whether the subspace has to be found again although no refresh is planned."""
        return False

    def found(
        self, gradient: Tensor, previous: Subspace | None, found: Subspace, state: State
    ) -> None:
        """Take note of a refresh in the bucket's loaded state."""


@dataclass(frozen=True)
class Every(Refresh):
    """Every `gap` steps.

    At steps 1, 1 + gap, 1 + 2 gap, ... (`phase=1`), or 1, gap, 2 gap, ... (`phase=0`).

    Args:
        gap: steps between refreshes.
        phase: see above.
        stagger: shift the schedule of the i-th of N parameters by `i * gap // N` steps, so that no
            single step pays for all of them. The first basis is still found at step 1 for every
            parameter.
    """

    gap: int
    phase: int = 1
    stagger: bool = False

    def __post_init__(self) -> None:
        check_gap("update_proj_gap", self.gap)

    def scheduled(self, step: int, position: int, count: int, state: Mapping[str, Any]) -> int:
        """See `Refresh.scheduled`."""
        offset = self.phase + (position * self.gap // count if self.stagger else 0)
        return max(1, (step - offset) // self.gap * self.gap + offset)


@dataclass(frozen=True)
class OnDrift(Refresh):
    """When the subspace has drifted.

    It then captures less than `tolerance` of what it captured when it was found. The captured
    energy `||project(G)||^2 / ||G||^2` is compared every `check_every` steps, which
    costs one host synchronisation then.

    Args:
        tolerance: in (0, 1].
        check_every: steps between checks.
    """

    tolerance: float = 0.9
    check_every: int = 10

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance <= 1.0:
            raise ValueError(f"tolerance={self.tolerance!r} must lie in (0, 1]")
        check_gap("check_every", self.check_every)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The energy that was captured at the last refresh."""
        return (StateDeclaration("captured", "scalar", "scalar"),)

    def drifted(self, gradient: Tensor, subspace: Subspace, state: State, step: int) -> bool:
        """See the class. Buckets of several parameters refresh together."""
        if (step - 1) % self.check_every:
            return False
        limit = self.tolerance * state["captured"]
        return bool((captured_energy(gradient, subspace) < limit).any())

    def found(
        self, gradient: Tensor, previous: Subspace | None, found: Subspace, state: State
    ) -> None:
        """Remember the captured energy."""
        state["captured"].copy_(captured_energy(gradient, found))


@dataclass(frozen=True)
class Lazy(Refresh):
    """A gap of each parameter's own, which grows while its subspace stays put (Q-GaLore).

    At every refresh the new subspace is compared with the previous one. When the mean of the last
    `queue` similarities reaches `threshold`, the gap is multiplied with `factor`; refreshes are at
    the multiples of the gap. Zhang et al.: Q-GaLore, 2024, arXiv 2407.08296.

    Args:
        gap: steps between refreshes at first.
        threshold: see above, in [0, 1].
        factor: see above, at least 1.
        queue: number of similarities averaged.
        measure: "cosine" of the leading basis vectors; "overlap" of the whole subspaces,
            `||Q_old^T Q_new||^2 / r`, needs no stored vector.
        signed: keep the sign of the cosine, as the released code does although singular vectors
            have none. Finders that align signs make it positive anyway.
    """

    gap: int
    threshold: float = 0.4
    factor: float = 2.0
    queue: int = 5
    measure: Literal["cosine", "overlap"] = "cosine"
    signed: bool = False

    def __post_init__(self) -> None:
        check_gap("update_proj_gap", self.gap)
        check_gap("queue_size", self.queue)
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"cos_threshold={self.threshold!r} must lie in [0, 1]")
        if not self.factor >= 1.0:
            raise ValueError(f"gamma_proj={self.factor!r} must be at least 1")
        if self.measure not in ("cosine", "overlap"):
            raise ValueError(f"measure={self.measure!r} must be cosine or overlap")

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The leading basis vector as it was found, before it was stored in few bits."""
        if self.measure == "overlap":
            return ()
        lead = layout.view[:-2]
        shape = (*lead, layout.side_size)
        return (StateDeclaration("leading", "basis", shape, dtype=torch.float32),)

    def counters(self) -> State:
        """By how much the gap has grown, and the last similarities."""
        return {"gap_growth": 1.0, "similarities": []}

    def scheduled(self, step: int, position: int, count: int, state: Mapping[str, Any]) -> int:
        """See `Refresh.scheduled`."""
        gap = self.gap_in_force(state.get("gap_growth", 1.0))
        return (step - 1) // gap * gap + 1

    def found(
        self, gradient: Tensor, previous: Subspace | None, found: Subspace, state: State
    ) -> None:
        """Compare and lengthen the gap; one host synchronisation per refresh."""
        if self.measure == "cosine":
            if not isinstance(found, OneSided):
                raise TypeError(
                    "refresh Lazy('cosine') needs a subspace on one side; use 'overlap'"
                )
            leading = found.dense(torch.float32)[..., 0]
            similar = (leading * state["leading"]).sum(-1)
            similar = similar if self.signed else similar.abs()
            state["leading"] = leading
        elif previous is not None:
            similar = found.overlap(previous)
        if previous is None:
            return
        rows = similar.reshape(len(state["gap_growth"]), -1).mean(-1).tolist()
        recent = [
            [*past, value][-self.queue :]
            for past, value in zip(state["similarities"], rows, strict=True)
        ]
        state["similarities"] = recent
        state["gap_growth"] = [
            growth * self.factor
            if len(last) == self.queue and sum(last) / self.queue >= self.threshold
            else growth
            for growth, last in zip(state["gap_growth"], recent, strict=True)
        ]

    def gap_in_force(self, growth: float) -> int:
        """Steps between refreshes of a parameter whose gap has grown so much."""
        return int(self.gap * growth)


def resolve_refresh(choice: str | Refresh | None, own: Refresh) -> Refresh:
    """The policy that the engine's `refresh` option makes of a recipe's own.

    None keeps the recipe's; "staggered" spreads its refreshes over the gap; "lazy" lets each
    parameter's gap grow while its subspace stays; "drift" looks at the captured energy.

    Raises:
        ValueError: if the choice is unknown, or the recipe has no gap to start from.
    """
    if choice is None or isinstance(choice, Refresh):
        return own if choice is None else choice
    if choice not in ("staggered", "lazy", "drift"):
        raise ValueError(
            f"refresh={choice!r} must be 'staggered', 'lazy', 'drift', a Refresh, or None"
        )
    if choice == "drift":
        return OnDrift()
    if isinstance(own, Lazy):
        if choice == "lazy":
            return own
        raise ValueError(
            "refresh='staggered': this method's gaps change, which spreads them anyway"
        )
    if not isinstance(own, Every) or own.gap == 1:
        raise ValueError(
            f"refresh={choice!r} needs a method that refreshes every so many steps; this one uses "
            f"{own}"
        )
    return replace(own, stagger=True) if choice == "staggered" else Lazy(own.gap, measure="overlap")
