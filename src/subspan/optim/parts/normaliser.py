"""Normaliser: a second-moment scaling in full size, of the gradient or of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.parts.adafactor import factored_declarations, factored_scaling
from subspan.optim.parts.inner import adam_kernel, check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration


class Normaliser:
    """Base. `after` says whether the update is divided rather than the gradient scaled."""

    after: ClassVar[bool] = False

    def works_on_slices(self, layout: Layout, dim: int) -> bool:
        """Whether pieces of a parameter that is cut along `dim` can be treated apart."""
        return False

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The state kept for a parameter of that layout."""
        raise TypeError(f"{type(self).__name__} does not define declare()")

    def normalise(
        self, gradient: Tensor, state: dict[str, Any], step: int, work: Workspace
    ) -> Tensor:
        """The scaled gradient; the averages are updated in place.

        `step` is 1-based and never restarts.
        """
        raise TypeError(f"{type(self).__name__} does not scale the gradient")

    def sums(self, gradient: Tensor, state: dict[str, Any], work: Workspace) -> Tensor | None:
        """What `divisor` needs of the whole gradient, finite only where that is; None for nothing.

        Nothing is updated yet.
        """
        return None

    def divisor(
        self, gradient: Tensor, sums: Tensor | None, state: dict[str, Any], work: Workspace
    ) -> Tensor | None:
        """What the update is divided by, broadcastable to `(..., m, n)`; None for nothing.

        The averages are updated in place.
        """
        raise TypeError(f"{type(self).__name__} does not divide the update")

    def can_step_weights(self, sums: Tensor | None) -> bool:
        """Whether `step_weights` takes the step."""
        return False

    def step_weights(
        self,
        weight: Tensor,
        gradient: Tensor,
        extra: Tensor,
        state: dict[str, Any],
        step: float,
        shrink: float,
    ) -> None:
        """`W <- (1 - shrink) W - step (extra + G) / divisor`; `extra` is overwritten."""
        raise TypeError(f"{type(self).__name__} has no fused kernel")


@dataclass(frozen=True)
class FactoredRMS(Normaliser):
    """Adafactor's factored second moment of the whole gradient (Flora).

    It is taken before the gradient is projected. Row and column means cost m + n numbers per
    matrix. Vectors keep one number per entry.

    Args:
        eps: added to the squared gradient.
        decay_rate: the averaging rate is `1 - t**decay_rate`.
    """

    eps: float = 1e-30
    decay_rate: float = -0.8

    def __post_init__(self) -> None:
        check_non_negative(eps=self.eps)

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """Row and column means."""
        return factored_declarations(layout.is_matrix, "matrix", "gradient_sq")

    def normalise(
        self, gradient: Tensor, state: dict[str, Any], step: int, work: Workspace
    ) -> Tensor:
        """See `Normaliser`."""
        return factored_scaling(
            gradient, state, step, self.decay_rate, self.eps, work.like(gradient), "gradient_sq"
        )


@dataclass(frozen=True)
class SubsetNorm(Normaliser):
    """One second moment per subset of coordinates; the lifted update is divided by its root.

        v_i <- b2 v_i + (1 - b2) sum_{j in subset i} G_j^2;   divisor sqrt(v_i) + eps

    A sum, not a mean. b2 = 1 accumulates (AdaGrad). Parameters that are not projected have a subset
    per entry, which is Adam's second moment. Nguyen, Nguyen: Subset-Norm and Subspace-Momentum,
    2024, arXiv 2411.07120.

    Args:
        beta2: averaging rate.
        eps: see above.
        subset_size: "heuristics": one subset per row if m >= n, else per column, so max(m, n)
            numbers (one per entry of a vector); n > 0: n consecutive entries of the flattened
            matrix; n < 0: `sqrt(d) / |n|` of them. Sizes are lowered to the next divisor of the
            number of entries d.
        everywhere: subsets also for what is not projected.
    """

    beta2: float = 0.999
    eps: float = 1e-6
    subset_size: int | Literal["heuristics"] = "heuristics"
    everywhere: bool = False

    after: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_non_negative(eps=self.eps)
        if not 0.0 <= self.beta2 <= 1.0:
            raise ValueError(f"beta2={self.beta2!r} must lie in [0, 1]")
        size = self.subset_size
        if size != "heuristics" and (
            not isinstance(size, int) or isinstance(size, bool) or not size
        ):
            raise ValueError(
                f"subset_size={size!r} must be 'heuristics' or an integer other than 0"
            )

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """One number per subset."""
        return (StateDeclaration("subset_sq", "second_moment", self._shape(layout)),)

    def works_on_slices(self, layout: Layout, dim: int) -> bool:
        """See `Normaliser`: rows of a matrix cut along rows, columns of one cut along columns."""
        if self._per_entry(layout):
            return True
        return self.subset_size == "heuristics" and dim == (0 if _has_more_rows(layout) else 1)

    def _per_entry(self, layout: Layout) -> bool:
        """Whether every entry is a subset."""
        if self.subset_size == 1 or not (layout.projected or self.everywhere):
            return True
        return self.subset_size == "heuristics" and not layout.is_matrix

    def _shape(self, layout: Layout) -> tuple[int, ...]:
        """That of the gradient for subsets of one entry; else see `_sums`."""
        lead, matrix = layout.view[:-2], layout.view[-2:]
        count = math.prod(matrix)
        if self._per_entry(layout) or (not count and layout.whole is None):
            return layout.view
        if self.subset_size == "heuristics":
            m, n = matrix
            return (*lead, m, 1) if _has_more_rows(layout) else (*lead, 1, n)
        size = self.subset_size
        size = min(count, size if size > 0 else max(1, int(math.sqrt(count) / -size)))
        length = next(length for length in range(size, 0, -1) if count % length == 0)
        return layout.view if length == 1 else (*lead, count // length)

    def sums(self, gradient: Tensor, state: dict[str, Any], work: Workspace) -> Tensor | None:
        """The sum of squares of every subset of more than one entry."""
        shape = state["subset_sq"].shape
        if shape == gradient.shape:
            return None
        if self.subset_size != "heuristics":
            rows = gradient.reshape(*shape, -1)
            return torch.linalg.vector_norm(rows, dim=-1).square_()
        if shape[-1] == 1:
            return torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).square_()
        # A norm along columns strides through memory; squaring first and summing rows does not.
        squares = torch.mul(gradient, gradient, out=work.like(gradient))
        work.give_back(squares)
        return squares.sum(-2, keepdim=True)

    def divisor(
        self, gradient: Tensor, sums: Tensor | None, state: dict[str, Any], work: Workspace
    ) -> Tensor:
        """See `Normaliser`."""
        moment, share = state["subset_sq"].mul_(self.beta2), (1.0 - self.beta2) or 1.0
        if sums is None:
            moment.addcmul_(gradient, gradient, value=share)
            return torch.sqrt(moment, out=work.like(moment)).add_(self.eps)
        root: Tensor = moment.add_(sums, alpha=share).sqrt().add_(self.eps)
        if self.subset_size == "heuristics":
            return root
        length = gradient.numel() // root.numel()
        return root.repeat_interleave(length, -1).view(gradient.shape)

    def can_step_weights(self, sums: Tensor | None) -> bool:
        """If every entry has a second moment of its own, which is an average."""
        return sums is None and self.beta2 < 1.0

    def step_weights(
        self,
        weight: Tensor,
        gradient: Tensor,
        extra: Tensor,
        state: dict[str, Any],
        step: float,
        shrink: float,
    ) -> None:
        """See `Normaliser`.

        Adam's kernel averages a first moment, too: with rate 1/2 and `extra` in the place of that
        moment, it holds half of the update.
        """
        moment, betas = state["subset_sq"], (0.5, self.beta2)
        adam_kernel([weight], [gradient], [extra], [moment], betas, 2.0 * step, shrink, self.eps)


def _has_more_rows(layout: Layout) -> bool:
    """Whether a matrix, of which the layout may show a piece, has at least as many rows."""
    m, n = (layout.whole or layout.view)[-2:]
    return m >= n
