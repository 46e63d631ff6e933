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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.parts.inner import check_non_negative
from subspan.optim.parts.scene import Scene, Update
from subspan.subspaces.layout import Layout, StateDeclaration

TINY = 1e-8


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

    def join(self, scene: Scene, scale: float) -> Update:
        """See the class."""
        share = scale if self.scaled else 1.0
        inside = channel_energies(scene.coordinates, scene)
        factor = channel_factors(scene, inside)
        if self.growth_limit is not None:
            energies = residual_energies(scene, inside, share)
            norm = scene.total((factor.square() * energies).sum((-2, -1))).sqrt_()
            factor = factor * limit_growth(norm, scene.state, self.growth_limit)[..., None, None]
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
        value.sub_(scene.coordinates * rate)
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
        error = scene.state["error"].copy_(scene.gradient)
        scene.subspace.add_lift_(error, scene.coordinates, alpha=-self.share)
        if scene.momentum_loss is not None:
            weight = scene.inner.momentum_weight
            scene.momentum_loss.add_to_(error, weight / (1.0 - weight))
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

    def form(self, scene: Scene, remainder: Remainder) -> Update:
        """The update of one bucket."""
        root = math.sqrt(self.scale)
        tensor = self.granularity == "tensor"
        if tensor:
            factor = tensor_factor(scene)
        else:
            factor = channel_factors(scene, channel_energies(scene.coordinates, scene))
        if self.growth_limit is not None:
            front = root if self.scale_front else 1.0
            energies = channel_energies(scene.gradient, scene)
            norm = scene.total((factor.square() * energies).sum((-2, -1))).sqrt_().mul_(front)
            factor = factor * limit_growth(norm, scene.state, self.growth_limit)[..., None, None]
        return Update(scale=factor * (root * scene.direction.step))


def check_growth_limit(limit: float | None) -> None:
    """Refuse a limiter that would forbid a constant norm.

    Raises:
        ValueError: if `limit` is a number below 1.
    """
    if limit is not None and not limit >= 1.0:
        raise ValueError(f"growth_limit={limit!r} must be at least 1, or None for no limiter")


def limiter_declaration(limit: float | None) -> tuple[StateDeclaration, ...]:
    """One norm per matrix; infinite before the first step, which therefore is never limited."""
    return (
        ()
        if limit is None
        else (StateDeclaration("update_norm", "scalar", "scalar", fill=math.inf),)
    )


def limit_growth(norm: Tensor, state: dict[str, Any], limit: float) -> Tensor:
    """The factor that keeps a norm from exceeding `limit` times the last one.

    The last one is updated in place. A zero norm leaves the memory alone: after a zero gradient the
    next update would otherwise start from 1e-8.

    Args:
        norm: one per matrix.
        state: holds "update_norm".
        limit: largest growth per step.
    """
    last = state["update_norm"]
    factor = (norm / (last + TINY)).clamp_(min=limit).reciprocal_().mul_(limit)
    last.copy_(torch.where(norm > 0, norm * factor, last))
    return factor


def channel_energies(x: Tensor, scene: Scene) -> Tensor:
    """Squared norm of every column (left, `(..., 1, n)`) or row (right, `(..., m, 1)`)."""
    if scene.layout.side != "left":
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    # A norm along columns strides through memory; squaring first and summing rows does not.
    squares = torch.mul(x, x, out=scene.work.like(x))
    energies = squares.sum(-2, keepdim=True)
    scene.work.give_back(squares)
    return energies


def channel_factors(scene: Scene, inside: Tensor) -> Tensor:
    """How much the inner optimizer rescaled every column (left) or row (right).

    Args:
        scene: the bucket.
        inside: `channel_energies` of the coordinates.
    """
    scaled = channel_energies(scene.direction.value, scene).sqrt_()
    return scaled.div_(inside.sqrt().add_(TINY))


def tensor_factor(scene: Scene) -> Tensor:
    """How much the inner optimizer rescaled the coordinates as a whole, `(..., 1, 1)`."""
    dims = (-1,) if scene.layout.side == "entries" else (-2, -1)
    scaled, plain = (
        scene.total(torch.linalg.vector_norm(x, dim=dims).square_()).sqrt_()
        if scene.sharding is not None
        else torch.linalg.vector_norm(x, dim=dims)
        for x in (scene.direction.value, scene.coordinates)
    )
    return (scaled / (plain + TINY))[..., None, None]


def residual_energies(scene: Scene, inside: Tensor, share: float) -> Tensor:
    """Squared norm of every column or row of `G - share lift(R)`, without forming it.

    `||G_j||^2 - 2 share ||R_j||^2 + share^2 ||lift(R)_j||^2`, where the last norm is that of the
    coordinates for an orthonormal basis and is weighted with the r x r Gram matrix otherwise.

    Args:
        scene: the bucket.
        inside: `channel_energies` of the coordinates, `||R_j||^2`.
        share: see above.
    """
    lifted = inside
    if not scene.subspace.orthonormal:
        basis = scene.subspace.dense(inside.dtype)
        assert isinstance(basis, Tensor)
        gram = basis.mT @ basis
        r = scene.coordinates
        left = scene.layout.side == "left"
        turned = (gram @ r if left else r @ gram).mul_(r)
        lifted = turned.sum(-2 if left else -1, keepdim=True)
    outside = channel_energies(scene.gradient, scene)
    return (outside - 2.0 * share * inside + share * share * lifted).clamp_(min=0.0)
