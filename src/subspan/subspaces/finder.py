"""What a finder is: what it sees at a refresh, and the state that holds its basis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from subspan import linalg
from subspan.subspaces.bases import Coordinates, Dense, Entries, Subspace, TwoSided
from subspan.subspaces.geometry import align_signs
from subspan.subspaces.layout import Layout, StateDeclaration

State = dict[str, Any]
Form = Literal["dense", "gaussian", "seeded", "coordinates"]
OneSide = Literal["left", "right"]


@dataclass
class Sight:
    """What a finder may look at during a refresh of one bucket.

    Args:
        gradient: `(..., m, n)`, in compute precision, error feedback included.
        layout: layout shared by the bucket (shapes, side, rank).
        layouts: one layout per parameter of the bucket, for names and positions.
        previous: the subspace in force until now; None at the first refresh.
        momentum: the first moment in coordinates of `previous`, its bias corrected; only for
            finders that set `reads_momentum`, and None before there is one.
        seeds: one seed per parameter, different at every refresh.
        state: the stored values of the bucket ("seed" as a list with one entry per parameter).
        step: the parameter's step, 1-based.
    """

    gradient: Tensor
    layout: Layout
    layouts: Sequence[Layout]
    previous: Subspace | None
    momentum: Tensor | None
    seeds: Sequence[int]
    state: State
    step: int

    def draw(self, sample: Callable[[int], Tensor]) -> Tensor:
        """Call `sample(seed)` for every matrix; stacked to the gradient's leading dimensions."""
        drawn = torch.stack([sample(seed) for seed in matrix_seeds(self.seeds, self.layout)])
        return drawn.view(*self.gradient.shape[:-2], *drawn.shape[1:]).to(self.gradient.device)


def matrix_seeds(seeds: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """One seed per matrix: the parameter's own, or derived ones if the parameter is stacked."""
    count = math.prod(layout.view[:-2])
    if len(layout.view) == 2:
        return tuple(seeds)
    return tuple(linalg.derive_seed(seed, number) for seed in seeds for number in range(count))


@dataclass(frozen=True)
class Finder:
    """Base of all finders. Subclasses set the class attributes and implement `find`."""

    form = "dense"
    reads_gradient = True
    reads_momentum = False
    supports_both_sides = True
    draws_from_seed = False

    def find(self, sight: Sight) -> Subspace:
        """The new subspace for the bucket that `sight` shows."""
        raise TypeError(f"{type(self).__name__} does not define find()")

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The state that holds this finder's basis for a parameter of that layout."""
        if self.form == "seeded":
            return ()
        if self.form == "coordinates":
            # Entry numbers of one matrix fit in 31 bits; int32 halves what rand-K has to remember.
            return (StateDeclaration("index", "basis", "index", dtype=torch.int32),)
        if layout.side == "both":
            return (
                StateDeclaration("basis_left", "basis", "basis_left"),
                StateDeclaration("basis_right", "basis", "basis_right"),
            )
        return (StateDeclaration("basis", "basis", "basis"),)

    def pack(self, subspace: Subspace) -> State:
        """The values to store for a subspace that `find` returned."""
        if self.form == "seeded":
            return {}
        if isinstance(subspace, Coordinates | Entries):
            return {"index": subspace.index}
        if isinstance(subspace, TwoSided):
            return {"basis_left": subspace.left, "basis_right": subspace.right}
        if isinstance(subspace, Dense):
            return {"basis": subspace.basis}
        raise TypeError(f"a finder cannot return a subspace of kind {type(subspace).__name__}")

    def unpack(
        self, state: State, layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        """The subspace that the stored values of a bucket describe."""
        side = layout.side
        if self.form == "seeded":
            return self._seeded(state["seed"], layout, dtype, device)
        if self.form == "coordinates":
            index = state["index"].long()
            if side == "entries":
                return Entries(index, layout.matrix)
            return Coordinates(layout.one_side, index, layout.side_size)
        if side == "both":
            return TwoSided(state["basis_left"], state["basis_right"])
        return Dense(layout.one_side, state["basis"], orthonormal=self.form == "dense")

    def _seeded(
        self, seeds: Sequence[int], layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        raise TypeError(f"{type(self).__name__} has no seeded basis")

    def _each_side(self, sight: Sight, basis: Callable[[OneSide], Tensor]) -> Subspace:
        """A dense subspace from a function of the side, signs aligned with the previous basis.

        Singular vectors have no sign of their own. Alignment makes the result independent of the
        one that the linear algebra library happens to return, so moments that are kept over a
        refresh are not mirrored at random.
        """
        if sight.layout.side == "both":
            left, right = basis("left"), basis("right")
            if isinstance(sight.previous, TwoSided):
                left = align_signs(left, sight.previous.left)
                right = align_signs(right, sight.previous.right)
            return TwoSided(left, right)
        found = basis(sight.layout.one_side)
        if isinstance(sight.previous, Dense):
            found = align_signs(found, sight.previous.basis)
        return Dense(sight.layout.one_side, found)
