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
from subspan.subspaces.fixed_columns import FixedColumns
from subspan.subspaces.geometry import align_signs
from subspan.subspaces.layout import Layout, StateDeclaration
from subspan.subspaces.tucker import Tucker

State = dict[str, Any]
Form = Literal["dense", "seeded", "coordinates", "columns", "modes"]
OneSide = Literal["left", "right"]
# Makes an uninitialised tensor like a given one.
Scratch = Callable[[Tensor], Tensor]


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
        lr_ratio: the learning rate now as a share of the first one, for finders with steps of their
            own.
        coordinates: the gradient in coordinates of `previous`; only in `follow`.
        scratch: where large temporaries come from.
    """

    gradient: Tensor
    layout: Layout
    layouts: Sequence[Layout]
    previous: Subspace | None
    momentum: Tensor | None
    seeds: Sequence[int]
    state: State
    step: int
    lr_ratio: float = 1.0
    coordinates: Tensor | None = None
    scratch: Scratch = torch.empty_like

    def stacked(self, values: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter as the batch that the gradient is; alone, the tensor itself."""
        single = self.gradient.dim() == len(self.layout.view)
        return (values[0] if single else torch.stack(list(values))).to(self.gradient.device)

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
    """Base of all finders. Subclasses set the class attributes and implement `find`.

    - form: how the basis is held: "dense" columns, a "seed", chosen "coordinates", chosen "columns"
      of a fixed matrix, or one factor per mode ("modes").
    - orthonormal: whether the columns are.
    - reads_gradient, reads_momentum: what `find` needs in its `Sight`.
    - supports_both_sides: whether it serves proj_type="full".
    - draws_from_seed: the parameter has a seed of its own, in `state["seed"]`.
    - follows: `follow` is called at the end of every step and moves the subspace.
    """

    form = "dense"
    orthonormal = True
    reads_gradient = True
    reads_momentum = False
    supports_both_sides = True
    draws_from_seed = False
    follows = False

    @property
    def mixes_entries(self) -> bool:
        """Whether every coordinate is a sum over a whole row or column, so that NaN spreads."""
        return self.form in ("dense", "seeded")

    def find(self, sight: Sight) -> Subspace:
        """The new subspace for the bucket that `sight` shows."""
        raise TypeError(f"{type(self).__name__} does not define find()")

    def follow(self, sight: Sight) -> Subspace:
        """The subspace from the next step on; `sight.previous` is the one of this step."""
        raise TypeError(f"{type(self).__name__} does not define follow()")

    def seeded(self) -> Finder | None:
        """The same finder with its basis regenerated from a seed; None if it depends on more."""
        return None

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The state that holds this finder's basis for a parameter of that layout."""
        if self.form == "seeded":
            return ()
        if self.form in ("coordinates", "columns"):
            # Entry numbers of one matrix fit in 31 bits; int32 halves what rand-K has to remember.
            return (StateDeclaration("index", "basis", "index", dtype=torch.int32),)
        if self.form == "modes":
            sizes = zip(layout.view, layout.mode_ranks, strict=True)
            return tuple(
                StateDeclaration(f"factor_{mode}", "basis", (size, rank))
                for mode, (size, rank) in enumerate(sizes)
                if rank is not None
            )
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
        if isinstance(subspace, Coordinates | Entries | FixedColumns):
            return {"index": subspace.index}
        if isinstance(subspace, Tucker):
            factors = enumerate(subspace.factors)
            return {f"factor_{mode}": f for mode, f in factors if f is not None}
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
        if self.form in ("coordinates", "columns"):
            return self.indexed(state["index"].long(), layout, dtype, device)
        if side == "modes":
            modes = range(len(layout.view))
            return Tucker(tuple(state.get(f"factor_{mode}") for mode in modes), self.orthonormal)
        if side == "both":
            return TwoSided(state["basis_left"], state["basis_right"], self.orthonormal)
        return Dense(layout.one_side, state["basis"], self.orthonormal)

    def indexed(
        self, index: Tensor, layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> Subspace:
        """The subspace of chosen coordinates or columns."""
        if layout.side == "entries":
            return Entries(index, layout.matrix)
        return Coordinates(layout.one_side, index, layout.side_size)

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
