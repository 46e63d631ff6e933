"""Output and remainder: how the full-size update is made, and what is done with the residual.

Every published form is a case of one expression,

    W <- decay W - (lift(coordinates) + scale ∘ G + extra) / divisor,

where `scale` is a number or one factor per column or row of the gradient. The residual
`G - lift(project(G))` times such a factor never has to be formed: factors per column commute with a
lift from the left (and per row from the right), so its lifted half joins the coordinates before the
one lift that is made anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.parts.growth import (
    channel_factors,
    channel_norms,
    check_growth_limit,
    limit_growth,
    limiter_declaration,
    residual_norms,
    tensor_factor,
)
from subspan.optim.parts.inner import check_non_negative
from subspan.optim.parts.scene import Scene, Update
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration


class Remainder:
    """Base: discard the residual (GaLore)."""

    reads_momentum_loss: ClassVar[bool] = False
    one_sided: ClassVar[bool] = False
    # Whether the rows (right) or columns (left) of the residual can be treated apart.
    works_on_slices: ClassVar[bool] = True

    @property
    def norms(self) -> int:
        """Numbers per matrix that its pieces have to add up in a step."""
        return 0

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The state kept for a parameter of that layout."""
        return ()

    def measure(self, gradient: Tensor, layout: Layout, work: Workspace) -> Tensor | None:
        """Norms of the gradient that `join` reads, taken while the gradient is in the cache.

        They are finite only where the gradient is.
        """
        return None

    def join(self, scene: Scene, scale: float) -> Update:
        """The update for a direction that is lifted with factor `scale`."""
        return Update(scene.direction.value, scene.direction.step * scale)


@dataclass(frozen=True)
class Discard(Remainder):
    """The residual is dropped (GaLore)."""


@dataclass(frozen=True)
class NormScaled(Remainder):
    """The residual scaled as the inner optimizer scaled the coordinates (Fira).

    Chen et al. 2024, arXiv 2410.01623.

        phi_j = ||N_j|| / (||R_j|| + 1e-8),  S = (G - a lift(R)) phi
        W <- W - step (scale lift(N) + S)

    with one factor per column (left) or row (right). A limiter per matrix keeps the norm of S from
    growing by more than `growth_limit` per step.

    Args:
        growth_limit: 1.01 in the paper; None for no limiter.
        scaled: True subtracts `a = scale` times the projection, as the released code does; False
            takes the plain residual `a = 1`, as the paper writes it.
    """

    growth_limit: float | None = 1.01
    scaled: bool = True

    one_sided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_growth_limit(self.growth_limit)

    @property
    def norms(self) -> int:
        """The one that the limiter looks at."""
        return int(self.growth_limit is not None)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The limiter's last norm."""
        return limiter_declaration(self.growth_limit)

    def measure(self, gradient: Tensor, layout: Layout, work: Workspace) -> Tensor | None:
        """What the limiter needs of the residual."""
        return None if self.growth_limit is None else channel_norms(gradient, layout, work)

    def join(self, scene: Scene, scale: float) -> Update:
        """See the class."""
        share = scale if self.scaled else 1.0
        inside = channel_norms(scene.coordinates, scene.layout, scene.work)
        factor = channel_factors(scene, inside)
        if self.growth_limit is not None:
            norms = residual_norms(scene, inside, share).mul_(factor)
            factor = limit_growth(factor, norms, scene, self.growth_limit)
        value = scene.direction.value if scale == 1.0 else scene.direction.value.mul_(scale)
        value.addcmul_(scene.coordinates, factor, value=-share)
        return Update(value, scene.direction.step, factor * scene.direction.step)


@dataclass(frozen=True)
class Stateless(Remainder):
    """The residual takes a plain step of its own: `lr weight sign(E)` or `lr weight E`.

    FRUGAL (Zmushko et al. 2024, arXiv 2411.07837) takes the sign. With "sgd" and `momentum_loss`,
    Flora's rule: the raw gradient is averaged into the step, and the momentum that a new basis
    cannot hold still counts once.

    Args:
        rule: "sign" or "sgd".
        weight: factor on the learning rate.
        momentum_loss: factor on the momentum lost in this step's change of basis.
    """

    rule: Literal["sign", "sgd"] = "sign"
    weight: float = 1.0
    momentum_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in ("sign", "sgd"):
            raise ValueError(f"rule={self.rule!r} must be sign or sgd")
        check_non_negative(weight=self.weight, momentum_loss=self.momentum_loss)

    @property
    def reads_momentum_loss(self) -> bool:  # type: ignore[override]
        """Whether the lost momentum is asked for."""
        return self.momentum_loss > 0

    def join(self, scene: Scene, scale: float) -> Update:
        """See the class."""
        rate = scene.lr * self.weight
        if self.rule == "sign":
            extra = scene.work.like(scene.gradient).copy_(scene.gradient)
            scene.subspace.add_lift_(extra, scene.coordinates, alpha=-1.0)
            return Update(
                scene.direction.value, scene.direction.step * scale, extra=extra.sign_().mul_(rate)
            )
        value = scene.direction.value.mul_(scene.direction.step * scale)
        if isinstance(rate, Tensor):
            value.sub_(scene.coordinates * rate)
        else:
            value.sub_(scene.coordinates, alpha=rate)
        return Update(
            value, 1.0, rate, loss=scene.momentum_loss, rate=scene.lr * self.momentum_loss
        )


@dataclass(frozen=True)
class ErrorFeedback(Remainder):
    """The residual is stored and added to the next gradient (LDAdam).

    Robert et al. 2024, arXiv 2410.16103.

        E = A - lift(R) + b1 / (1 - b1) (lift_old(M_old) - lift_new(M_new)),  A = G + E_before

    The last term is what the first moment lost in the change of basis. The buffer is a state of its
    own, so `.grad` stays the user's: it may be cleared, clipped or averaged as usual.

    Args:
        momentum: include that term; DCT-AdamW does not.
        share: the part of the projection that leaves the buffer, `E = A - share lift(R)`. Trion's
            full-size momentum is such a buffer with `share = 1 - mu`.
    """

    momentum: bool = True
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share={self.share!r} must lie in (0, 1]")

    @property
    def reads_momentum_loss(self) -> bool:  # type: ignore[override]
        """Whether the lost momentum is asked for."""
        return self.momentum

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One full-size buffer."""
        return (StateDeclaration("error", "error", "matrix"),)

    def join(self, scene: Scene, scale: float) -> Update:
        """See the class."""
        error, inside, loss = scene.state["error"], scene.coordinates, scene.momentum_loss
        if error is not scene.gradient:
            error.copy_(scene.gradient)
        share = self.share
        if loss is not None:
            weight = scene.inner.momentum_weight / (1.0 - scene.inner.momentum_weight)
            loss.previous.add_lift_(error, loss.before, alpha=weight)
            # What the new basis holds of gradient and momentum leaves the buffer in one lift.
            inside, share = loss.after.mul_(weight).add_(inside, alpha=share), 1.0
        scene.subspace.add_lift_(error, inside, alpha=-share)
        return super().join(scene, scale)


@dataclass(frozen=True)
class PassThrough(Remainder):
    """The residual takes the same step as the direction: plain gradient descent outside the
    subspace (Subspace-Momentum).

        W <- W - step (lift(N) + G - lift(R))
    """

    def join(self, scene: Scene, scale: float) -> Update:
        """See the class."""
        value = scene.direction.value if scale == 1.0 else scene.direction.value.mul_(scale)
        return Update(value.sub_(scene.coordinates), scene.direction.step, scene.direction.step)


@dataclass(frozen=True)
class Lift:
    """The direction is lifted: `W <- W - step scale lift(N)`, plus what the remainder adds.

    Args:
        scale: GaLore's alpha.
    """

    scale: float = 1.0

    lifts: ClassVar[bool] = True
    norms: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_non_negative(scale=self.scale)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """No state."""
        return ()

    def measure(
        self, gradient: Tensor, layout: Layout, remainder: Remainder, work: Workspace
    ) -> Tensor | None:
        """What the remainder reads."""
        return remainder.measure(gradient, layout, work)

    def form(self, scene: Scene, remainder: Remainder) -> Update:
        """The update of one bucket."""
        return remainder.join(scene, self.scale)


@dataclass(frozen=True)
class SignedLift:
    """The sign of the lifted direction: `W <- W - step sign(lift(N))` (Online Subspace Descent's
    Lion, which takes the sign in full size)."""

    lifts: ClassVar[bool] = True
    norms: ClassVar[int] = 0

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """No state."""
        return ()

    def measure(
        self, gradient: Tensor, layout: Layout, remainder: Remainder, work: Workspace
    ) -> Tensor | None:
        """Nothing."""
        return None

    def form(self, scene: Scene, remainder: Remainder) -> Update:
        """The update of one bucket."""
        lifted = scene.subspace.lift(scene.direction.value, out=scene.work.like(scene.gradient))
        return Update(extra=lifted.sign_().mul_(scene.direction.step))


@dataclass(frozen=True)
class RescaledGradient:
    """The raw gradient, rescaled by what happened inside the subspace (APOLLO).

    Zhu et al. 2024, arXiv 2412.05270.

        "channel": phi_j = ||N_j|| / (||R_j|| + 1e-8) per column (left) or row (right)
        "tensor":  phi = ||N|| / (||R|| + 1e-8)
        W <- W - step sqrt(scale) limited(G phi)

    Args:
        granularity: "channel" or "tensor".
        scale: its square root multiplies the update.
        growth_limit: as in `NormScaled`.
        scale_front: apply `sqrt(scale)` before the limiter instead of after it.
    """

    granularity: Literal["channel", "tensor"] = "channel"
    scale: float = 1.0
    growth_limit: float | None = 1.01
    scale_front: bool = False

    lifts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_non_negative(scale=self.scale)
        check_growth_limit(self.growth_limit)
        if self.granularity not in ("channel", "tensor"):
            raise ValueError(f"scale_type={self.granularity!r} must be channel or tensor")

    @property
    def norms(self) -> int:
        """See `Remainder.norms`: those of "tensor", and the one that the limiter looks at."""
        return 2 * (self.granularity == "tensor") + (self.growth_limit is not None)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The limiter's last norm."""
        return limiter_declaration(self.growth_limit)

    def measure(
        self, gradient: Tensor, layout: Layout, remainder: Remainder, work: Workspace
    ) -> Tensor | None:
        """What the limiter needs of the gradient."""
        if self.growth_limit is None:
            return None
        if self.granularity == "tensor":
            return torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
        return channel_norms(gradient, layout, work)

    def form(self, scene: Scene, remainder: Remainder) -> Update:
        """The update of one bucket."""
        root = math.sqrt(self.scale)
        if self.granularity == "tensor":
            factor = tensor_factor(scene)
        else:
            inside = channel_norms(scene.coordinates, scene.layout, scene.work)
            factor = channel_factors(scene, inside)
        if self.growth_limit is not None:
            norms = scene.norms * factor
            front = root if self.scale_front else 1.0
            factor = limit_growth(factor, norms, scene, self.growth_limit, front)
        return Update(scale=factor * (root * scene.direction.step))
