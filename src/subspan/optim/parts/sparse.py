"""A remainder that keeps moments of a few entries of the residual. Experimental."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subspan.optim.parts.activity import check_gap
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Remainder
from subspan.optim.parts.scene import Scene, Update
from subspan.subspaces.layout import Layout, StateDeclaration
from subspan.subspaces.subspace import OneSided

# Elements of the chosen rows of a factor that are held at once.
PIECE = 1 << 17


@dataclass(frozen=True)
class SparseMoments(Remainder):
    """Adam on the entries of the residual that were largest in the first steps (GaLore+).

    Liao et al. 2024, arXiv 2412.19820; reconstructed from the abstract and reviews, no code is
    public. With the residual E = G - lift(R) and a set I of entries:

        steps 1 to warmup:  I = the entries with the largest |E| seen so far
        afterwards:         Adam on E_I, with moments of its own, and the factor scale

    The set is found exactly without a buffer of the size of G: an entry that belongs to it at the
    end belonged to it at the step of its largest value and ever since. Until then the slots of the
    second moment hold these values' squares.

    Args:
        density: share of the entries, in (0, 1].
        warmup: steps in which the set is collected.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
    """

    density: float = 0.01
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    works_on_slices: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density={self.density!r} must lie in (0, 1], or be 0 for none")
        check_gap("warmup", self.warmup)
        Adam(self.betas, self.eps)  # checks them

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Places and moments of the chosen entries; nothing at full rank, which leaves none."""
        if _is_whole(layout):
            return ()
        *lead, m, n = layout.view
        shape = (*lead, max(1, math.floor(self.density * m * n)))
        return (
            StateDeclaration("sparse_index", "basis", shape, dtype=torch.int32),
            StateDeclaration("sparse_exp_avg", "first_moment", shape),
            StateDeclaration("sparse_exp_avg_sq", "second_moment", shape),
        )

    def join(self, scene: Scene, scale: float) -> Update:
        """See the class."""
        update = super().join(scene, scale)
        if _is_whole(scene.layout):
            return update
        step = scene.state["step"][0] + 1
        index = scene.state["sparse_index"].long()
        if step <= self.warmup:
            residual = scene.work.like(scene.gradient).copy_(scene.gradient)
            scene.subspace.add_lift_(residual, scene.coordinates, alpha=-1.0)
            self._collect(residual.flatten(-2).square_(), index, scene, last=step == self.warmup)
            return update
        entries = _residual_at(index, scene)
        moments = {
            "exp_avg": scene.state["sparse_exp_avg"],
            "exp_avg_sq": scene.state["sparse_exp_avg_sq"],
        }
        adam = Adam(self.betas, self.eps, "hf")
        direction = adam.update(entries, moments, step - self.warmup, 1.0, scene.work)
        # The rate may differ between matrices, `(..., 1, 1)`.
        update.loss = SparseChange(index, direction.value)
        update.rate = scene.lr * (direction.step * scale)
        return update

    def _collect(self, squares: Tensor, index: Tensor, scene: Scene, *, last: bool) -> None:
        """Keep the places of the largest squares, now or before."""
        best = scene.state["sparse_exp_avg_sq"]
        squares.scatter_reduce_(-1, index, best, "amax")
        values, places = _largest(squares, best)
        if last:  # the squares make way for moments, and neighbours in memory come together
            values, places = torch.zeros_like(values), places.sort(-1).values
        scene.state["sparse_index"].copy_(places)
        best.copy_(values)


@dataclass
class SparseChange:
    """A full-size change that is zero but for some entries of each matrix, counted row by row."""

    index: Tensor
    values: Tensor

    def add_to_(self, target: Tensor, weight: float) -> None:
        """`target <- target + weight * change`, in place."""
        flat = target.view(*target.shape[:-2], -1)
        flat.scatter_add_(-1, self.index, self.values if weight == 1.0 else self.values * weight)


def _largest(squares: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """The largest squares and their places; those that were before are among the squares.

    None that is smaller than all of those can be among them, which leaves few to be ordered. (A GPU
    would have to wait for their number.)
    """
    count = best.shape[-1]
    if squares.dim() > 1 or squares.device.type != "cpu":
        values, places = squares.topk(count, dim=-1)
        return values, places
    candidates = (squares < best.min()).logical_not_().nonzero().squeeze(-1)
    values, order = squares[candidates].topk(count)
    return values, candidates[order]


def _residual_at(index: Tensor, scene: Scene) -> Tensor:
    """Entries of `G - lift(R)`, without the other ones where the basis is a matrix."""
    gradient, coordinates, subspace = scene.gradient, scene.coordinates, scene.subspace
    if not isinstance(subspace, OneSided):
        residual = scene.work.like(gradient).copy_(gradient)
        return subspace.add_lift_(residual, coordinates, alpha=-1.0).flatten(-2).gather(-1, index)
    entries = gradient.flatten(-2).gather(-1, index)
    left, right = subspace.dense(coordinates.dtype), coordinates.mT.contiguous()
    if subspace.side == "right":
        left, right = coordinates, left
    n = gradient.shape[-1]
    parts = (tensor.split(max(1, PIECE // left.shape[-1]), -1) for tensor in (index, entries))
    for places, part in zip(*parts, strict=True):
        rows = _rows(left, places.div(n, rounding_mode="floor"))
        part -= rows.mul_(_rows(right, places.remainder(n))).sum(-1)
    return entries


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """The rows `places` `(..., k)` of every matrix `(..., d, r)`."""
    if x.dim() == 2:
        return x.index_select(0, places)
    return x.gather(-2, places.unsqueeze(-1).expand(*places.shape, x.shape[-1]))


def _is_whole(layout: Layout) -> bool:
    """Whether the residual is zero but for rounding errors."""
    return layout.side in ("left", "right") and layout.rank == layout.side_size
