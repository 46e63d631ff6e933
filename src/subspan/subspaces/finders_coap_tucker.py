"""COAP on convolution kernels: Tucker factors that are nudged, and recomputed now and then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from subspan.linalg.tucker import tucker_factors
from subspan.subspaces.bases import Subspace
from subspan.subspaces.finder import Finder, Form, Sight
from subspan.subspaces.finders_tucker import aligned
from subspan.subspaces.tucker import Factors, Tucker


@dataclass(frozen=True)
class CoapTuckerNudge(Finder):
    """One clipped gradient step per refresh on the factors of the channel modes (COAP).

    Xiao et al. 2024, arXiv 2412.00071. The loss is that of `CoapNudge`, with cosines along mode 1:

        loss = mean((lift(project(G)) - G)^2) (1 - mean cos(lift(M), G));  F_i <- F_i - lr D_i

    with every D_i clipped to norm 1 and no orthonormalisation. The first factors and recomputations
    are three cold sweeps of higher-order orthogonal iteration.

    Args:
        recompute_every: steps; as for `CoapNudge`.
        momentum: let the loss look at the first moment.
        nudge_lr: step size.
    """

    recompute_every: int = 160
    momentum: bool = True
    nudge_lr: float = 0.1

    form: Form = "modes"
    orthonormal = False
    supports_both_sides = False

    @property
    def reads_momentum(self) -> bool:  # type: ignore[override]
        """Whether the loss looks at the first moment."""
        return self.momentum

    def find(self, sight: Sight) -> Subspace:
        ranks, gradient = sight.layout.mode_ranks, sight.gradient
        if not isinstance(sight.previous, Tucker):
            return Tucker(tucker_factors(gradient, ranks), orthonormal=False)
        previous = sight.previous.factors
        last = min(sight.state["refreshed"])
        if (sight.step - 1) // self.recompute_every > (last - 1) // self.recompute_every:
            found = aligned(tucker_factors(gradient, ranks), previous)
        else:
            found = self._nudged(previous, gradient, sight.momentum)
        return Tucker(found, orthonormal=False)

    def _nudged(self, factors: Factors, gradient: Tensor, momentum: Tensor | None) -> Factors:
        # Kernels are small: automatic differentiation costs less than it would take to explain.
        with torch.enable_grad():
            leaves = [None if f is None else f.detach().clone().requires_grad_() for f in factors]
            subspace = Tucker(tuple(leaves), orthonormal=False)
            dims = tuple(range(-len(factors), 0))
            again = subspace.lift(subspace.project(gradient))
            loss = (again - gradient).square().mean(dims)
            if momentum is not None:
                lifted = subspace.lift(momentum)
                cosine = functional.cosine_similarity(lifted, gradient, dim=1 - len(factors))
                loss = loss * (1.0 - cosine.mean(dims[1:]))
            held = [leaf for leaf in leaves if leaf is not None]
            slopes = iter(torch.autograd.grad(loss.sum(), held))
        moved: list[Tensor | None] = []
        for factor in factors:
            if factor is None:
                moved.append(None)
                continue
            slope = next(slopes)
            norm = torch.linalg.vector_norm(slope, dim=(-2, -1), keepdim=True)
            moved.append(factor - slope * (self.nudge_lr / (norm + 1e-6).clamp_(min=1.0)))
        return tuple(moved)
