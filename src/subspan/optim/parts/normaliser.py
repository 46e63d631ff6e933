"""Normaliser: a second-moment scaling in full size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subspan.optim.parts.adafactor import factored_declarations, factored_scaling
from subspan.optim.parts.inner import check_non_negative
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration


@dataclass(frozen=True)
class FactoredRMS:
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
        """The scaled gradient; the averages are updated in place.

        `step` is 1-based and never restarts.
        """
        return factored_scaling(
            gradient, state, step, self.decay_rate, self.eps, work.like(gradient), "gradient_sq"
        )
