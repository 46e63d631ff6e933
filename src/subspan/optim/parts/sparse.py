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
        residual = scene.work.like(scene.gradient).copy_(scene.gradient)
        scene.subspace.add_lift_(residual, scene.coordinates, alpha=-1.0)
        flat = residual.flatten(-2)
        step = scene.state["step"][0] + 1
        if step <= self.warmup:
            self._collect(flat.square_(), scene, last=step == self.warmup)
            return update
        index = scene.state["sparse_index"].long()
        entries = flat.gather(-1, index)
        moments = {
            "exp_avg": scene.state["sparse_exp_avg"],
            "exp_avg_sq": scene.state["sparse_exp_avg_sq"],
        }
        adam = Adam(self.betas, self.eps, "hf")
        direction = adam.update(entries, moments, step - self.warmup, 1.0, scene.work)
        change = direction.value.mul_(direction.step * scale)
        flat.zero_().scatter_(-1, index, change)
        update.extra = residual.mul_(scene.lr)
        return update

    def _collect(self, squares: Tensor, scene: Scene, *, last: bool) -> None:
        """Keep the places of the largest squares, now or before."""
        index, best = scene.state["sparse_index"], scene.state["sparse_exp_avg_sq"]
        squares.scatter_reduce_(-1, index.long(), best, "amax")
        values, places = squares.topk(best.shape[-1], dim=-1)
        index.copy_(places)
        best.copy_(torch.zeros_like(values) if last else values)


def _is_whole(layout: Layout) -> bool:
    """Whether the residual is zero but for rounding errors."""
    return layout.side in ("left", "right") and layout.rank == layout.side_size
