"""Parameter shapes of LLaMA-style models and fixed gradients for them; no model is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The matrices of a layer, in the order of `Shape.projected`.
_NAMES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@dataclass(frozen=True)
class Shape:
    """One model size with the rank at which the low-rank methods run on it."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    rank: int

    def projected(self) -> list[tuple[int, int]]:
        """(m, n) of the attention and MLP weights, in model order."""
        h, i = self.hidden, self.intermediate
        return ([(h, h)] * 4 + [(i, h)] * 2 + [(h, i)]) * self.layers

    def plain(self) -> list[tuple[int, ...]]:
        """Shapes of everything that is not projected: embedding, head, norms."""
        norms: list[tuple[int, ...]] = [(self.hidden,)] * (2 * self.layers + 1)
        return [(self.vocab, self.hidden), *norms, (self.vocab, self.hidden)]

    def elements(self) -> tuple[int, int]:
        """(projected, plain) parameter counts."""
        projected = sum(m * n for m, n in self.projected())
        return projected, sum(torch.Size(shape).numel() for shape in self.plain())

    def low_rank_elements(self, rank: int) -> tuple[int, int]:
        """(coordinates, basis) elements over all projected matrices: r*max(m,n) and r*min(m,n)."""
        ranks = [(min(rank, m, n), m, n) for m, n in self.projected()]
        return sum(r * max(m, n) for r, m, n in ranks), sum(r * min(m, n) for r, m, n in ranks)


SHAPES = {
    "60m": Shape("60m", hidden=512, intermediate=1376, layers=8, vocab=32000, rank=128),
    "10m": Shape("10m", hidden=256, intermediate=688, layers=8, vocab=8192, rank=64),
}


@dataclass
class Parameters:
    """A private copy of a model's parameters with their gradients set."""

    projected: list[nn.Parameter]
    plain: list[nn.Parameter]

    def named_projected(self) -> list[tuple[str, nn.Parameter]]:
        """With the names that they have in a LLaMA."""
        count = len(_NAMES)
        return [
            (f"model.layers.{i // count}.{_NAMES[i % count]}.weight", parameter)
            for i, parameter in enumerate(self.projected)
        ]

    def named_plain(self) -> list[tuple[str, nn.Parameter]]:
        """With names that belong to no layer."""
        return [(f"plain.{i}", parameter) for i, parameter in enumerate(self.plain)]


def decaying_gradient(m: int, n: int, generator: torch.Generator, decay: float = 0.02) -> Tensor:
    """An m x n Gaussian product whose spectrum falls roughly like exp(-decay * index)."""
    k = min(m, n)
    scale = torch.exp(-decay * torch.arange(k))
    left = torch.randn(m, k, generator=generator) * scale
    return left @ torch.randn(k, n, generator=generator) * (1e-3 / k**0.5)


class Model:
    """Fixed weights and gradients of one shape, handed out as copies."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._weights: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._projected_count = len(shape.projected())
        for m, n in shape.projected():
            self._weights.append(torch.randn(m, n, generator=generator) * 0.02)
            self._gradients.append(decaying_gradient(m, n, generator))
        for size in shape.plain():
            self._weights.append(torch.randn(size, generator=generator) * 0.02)
            self._gradients.append(torch.randn(size, generator=generator) * 1e-3)

    def copy(self) -> Parameters:
        """Fresh parameters and gradients: an optimizer may change either in place."""
        copies = [nn.Parameter(weight.clone()) for weight in self._weights]
        for parameter, gradient in zip(copies, self._gradients, strict=True):
            parameter.grad = gradient.clone()
        return Parameters(copies[: self._projected_count], copies[self._projected_count :])
