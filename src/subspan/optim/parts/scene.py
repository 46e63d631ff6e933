"""What a step sees of a bucket, and the update that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from subspan.optim.parts.inner import Direction, Inner, Rate
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.bases import Subspace
from subspan.subspaces.layout import Layout

if TYPE_CHECKING:
    from subspan.optim.sharding import Sharding


class Change(Protocol):
    """A change of the weights that is never formed in full size by itself."""

    def add_to_(self, target: Tensor, weight: float) -> None:
        """`target <- target + weight * change`, in place."""


@dataclass
class MomentumLoss:
    """What the lifted first moment lost when the basis changed, kept unlifted.

    loss = lift_old(before) - lift_new(after)
    """

    previous: Subspace
    before: Tensor
    found: Subspace
    after: Tensor

    def add_to_(self, target: Tensor, weight: float) -> None:
        """`target <- target + weight * loss`, in place."""
        self.previous.add_lift_(target, self.before, alpha=weight)
        self.found.add_lift_(target, self.after, alpha=-weight)


@dataclass
class Update:
    """The terms of an update; None means absent.

    W <- decay W - (alpha lift(coordinates) + scale ∘ G + extra + rate loss) / divisor
    """

    coordinates: Tensor | None = None
    alpha: Rate = 1.0
    scale: Rate | None = None
    extra: Tensor | None = None
    loss: Change | None = None
    rate: Rate = 1.0
    divisor: Tensor | None = None


@dataclass
class Seen:
    """What a step sees of one bucket.

    Args:
        gradient: `(..., m, n)`, normalised and with error feedback added, if any. When only
            coordinates were accumulated, these.
        coordinates: the projected gradient; without a subspace the gradient itself.
        subspace: the subspace that the coordinates belong to; None: they have full size.
        momentum_loss: what the lifted first moment lost when the basis changed in this step.
        refreshed: whether the stored basis has to be written.
        norms: of the gradient, as the output asks for them (`measure`).
        sums: the same for a normaliser that divides the update.
    """

    gradient: Tensor
    coordinates: Tensor
    subspace: Subspace | None
    momentum_loss: MomentumLoss | None
    refreshed: bool
    norms: Tensor | None = None
    sums: Tensor | None = None


@dataclass
class Scene:
    """What outputs and remainders work on, for one bucket with a subspace.

    Args:
        seen: gradient, coordinates and subspace.
        direction: what the inner optimizer made of the coordinates.
        layout: shapes and side.
        state: loaded state, updated in place.
        inner: the inner optimizer.
        lr: learning rate, a number or a tensor broadcastable to `(..., m, n)`.
        work: scratch memory.
        sharding: of a piece of a matrix; None: it is whole.
    """

    seen: Seen
    direction: Direction
    layout: Layout
    state: dict[str, Any]
    inner: Inner
    lr: Rate
    work: Workspace
    sharding: Sharding | None = None

    def norm(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The norm over `dims` of what has its pieces on all ranks if the matrix has."""
        own = torch.linalg.vector_norm(x, dim=dims)
        return own if self.sharding is None else self.sharding.total(own.square_()).sqrt_()

    @property
    def gradient(self) -> Tensor:
        """The gradient, `(..., m, n)`."""
        return self.seen.gradient

    @property
    def coordinates(self) -> Tensor:
        """The projected gradient."""
        return self.seen.coordinates

    @property
    def norms(self) -> Tensor:
        """Norms of the gradient, which the output has asked for."""
        assert self.seen.norms is not None
        return self.seen.norms

    @property
    def subspace(self) -> Subspace:
        """The subspace in force."""
        assert self.seen.subspace is not None
        return self.seen.subspace

    @property
    def momentum_loss(self) -> MomentumLoss | None:
        """What the lifted first moment lost in this step's change of basis."""
        return self.seen.momentum_loss
