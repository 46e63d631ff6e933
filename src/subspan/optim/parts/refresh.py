"""Refresh: when a finder runs again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subspan.subspaces.bases import Subspace
from subspan.subspaces.geometry import captured_energy
from subspan.subspaces.layout import StateDeclaration


@dataclass(frozen=True)
class Refresh:
    """Base: refresh once, at the first step, and never again."""

    def scheduled(self, step: int, position: int, count: int) -> int:
        """The latest step, not after `step`, at which a refresh is planned.

        A refresh is due when the last one was earlier than that, so one that had to be put off (a
        zero gradient carries no subspace) is made up for at the next step.

        Args:
            step: 1-based step of the parameter.
            position: of the parameter among the `count` projected ones of its group.
            count: see `position`.
        """
        return 1

    def declare(self) -> tuple[StateDeclaration, ...]:
        """The state that the policy itself needs."""
        return ()

    def drifted(
        self, gradient: Tensor, subspace: Subspace, reference: Tensor | None, step: int
    ) -> bool:
        """Whether the subspace has to be found again although no refresh is planned."""
        return False


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
        if not isinstance(self.gap, int) or isinstance(self.gap, bool) or self.gap < 1:
            raise ValueError(f"update_proj_gap={self.gap!r} must be an integer of at least 1")

    def scheduled(self, step: int, position: int, count: int) -> int:
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
        if not isinstance(self.check_every, int) or self.check_every < 1:
            raise ValueError(f"check_every={self.check_every!r} must be an integer of at least 1")

    def declare(self) -> tuple[StateDeclaration, ...]:
        """The energy that was captured at the last refresh."""
        return (StateDeclaration("captured", "scalar", "scalar"),)

    def drifted(
        self, gradient: Tensor, subspace: Subspace, reference: Tensor | None, step: int
    ) -> bool:
        """See the class. Buckets of several parameters refresh together."""
        if reference is None or (step - 1) % self.check_every:
            return False
        return bool((captured_energy(gradient, subspace) < self.tolerance * reference).any())
