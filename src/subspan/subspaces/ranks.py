"""Ranks that follow the energy of the gradients: few directions where few carry it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EnergyRank:
    """Give it as `rank`: every refresh chooses the rank of each matrix anew.

    It becomes the smallest one whose leading singular directions hold `share` of the gradient's
    energy `||G||_F^2`. When the states of all matrices of a param group would then take more than
    `budget` bytes, directions are dropped where a byte holds the smallest share of energy.

    Args:
        share: in (0, 1].
        budget: bytes for moments and bases of the group's projected matrices together; None for no
            limit. At least what `smallest` needs.
        smallest: lower bound of every rank.
        largest: upper bound; None for the smaller dimension.
    """

    share: float = 0.9
    budget: int | None = None
    smallest: int = 4
    largest: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.share, float) and 0.0 < self.share <= 1.0):
            raise ValueError(f"share={self.share!r} must be a number in (0, 1]")
        for name in ("budget", "smallest", "largest"):
            value = getattr(self, name)
            if value is None and name != "smallest":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.largest is not None and self.largest < self.smallest:
            raise ValueError(f"largest={self.largest} must be at least smallest={self.smallest}")


def energies(gradient: Tensor) -> Tensor:
    """Squared singular values of (..., m, n), descending, as shares of their sum.

    Averaged over leading dimensions; (min(m, n),) in float64. Of a zero matrix: zeros.
    """
    wide = gradient.double()
    gram = wide @ wide.mT if gradient.shape[-2] <= gradient.shape[-1] else wide.mT @ wide
    values = torch.linalg.eigvalsh(gram).clamp_(min=0.0).flip(-1)
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return shares.reshape(-1, shares.shape[-1]).mean(0)


def ranks_for(
    spectra: Sequence[Tensor], costs: Sequence[int], policy: EnergyRank, spent: int = 0
) -> list[int]:
    """The rank of every matrix.

    Args:
        spectra: what `energies` returns, one per matrix.
        costs: bytes of one more direction, one per matrix.
        policy: see `EnergyRank`.
        spent: bytes of the budget that other matrices hold.

    Raises:
        ValueError: the budget does not even hold the smallest ranks.
    """
    limits = [min(len(spectrum), policy.largest or len(spectrum)) for spectrum in spectra]
    lower = [min(policy.smallest, limit) for limit in limits]
    wanted = [
        min(limit, max(low, _needed(spectrum, policy.share)))
        for spectrum, low, limit in zip(spectra, lower, limits, strict=True)
    ]
    if policy.budget is None:
        return wanted
    left = policy.budget - spent - sum(n * cost for n, cost in zip(lower, costs, strict=True))
    if left < 0:
        raise ValueError(
            f"budget={policy.budget} bytes cannot hold rank {policy.smallest} for every matrix: "
            f"{policy.budget - left} are needed"
        )
    candidates = [
        (float(spectrum[place]) / cost, matrix, place, cost)
        for matrix, (spectrum, cost) in enumerate(zip(spectra, costs, strict=True))
        for place in range(lower[matrix], wanted[matrix])
    ]
    ranks = lower
    closed: set[int] = set()
    for _, matrix, _, cost in sorted(candidates, key=lambda item: (-item[0], item[1], item[2])):
        if matrix in closed or cost > left:
            closed.add(matrix)  # a later direction of the same matrix must not jump the queue
            continue
        ranks[matrix] += 1
        left -= cost
    return ranks


def _needed(spectrum: Tensor, share: float) -> int:
    """The number of leading directions that hold a share of the energy."""
    held = spectrum.cumsum(0)
    reached = held >= min(share, float(held[-1])) - 1e-12
    return int(reached.to(torch.int8).argmax()) + 1 if math.isfinite(float(held[-1])) else 1
