"""One small real problem for the contract suite, and the options that make every recipe fit it.

Nothing here names a recipe: a method enters the suite by being registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import subspan.optim as optim

GAP = 4
GAP_OPTIONS = ("update_proj_gap", "update_gap", "kappa", "switch_block_every")
METHODS = sorted(optim.methods())
TEXT = (
    "a subspace optimizer keeps its moments inside a small subspace of the gradient and lifts the "
    "step back to "
    "full size; what it discards, how it finds the subspace and when it looks again is what "
    "methods differ in. "
) * 4


class Tiny(nn.Module):
    """Next-byte prediction with an embedding, two equal and one other matrix, a convolution, a norm
    and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(128, 16)
        self.mix = nn.Conv1d(16, 24, 3)
        self.first = nn.Linear(24, 24)
        self.second = nn.Linear(24, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.wide = nn.Linear(24, 40)
        self.lm_head = nn.Linear(40, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed_tokens(tokens).mT).mT.relu()
        x = x + self.second(self.first(x).relu())
        return self.lm_head(self.wide(self.norm(x)).relu())


def options_for(method: str, **more: Any) -> dict[str, Any]:
    """Options that suit the small problem: rank 4 at most and a refresh every `GAP` steps."""
    defaults = optim.methods()[method].defaults
    chosen: dict[str, Any] = {name: GAP for name in GAP_OPTIONS if name in defaults}
    if defaults.get("rank"):
        chosen["rank"] = min(4, defaults["rank"])
    return chosen | more


class Problem:
    """A model, its optimizer, and a way to take steps on the text.

    `prepare` is called with the model before the optimizer is built; `share` is which of how many
    equal parts of every batch the loss is of.
    """

    def __init__(
        self,
        method: str,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        prepare: Callable[[Tiny], object] = lambda model: None,
        share: tuple[int, int] = (0, 1),
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.share = Tiny().to(dtype), share
        prepare(self.model)
        self.optimizer = optim.for_model(self.model, method, **options_for(method, **options))
        data = torch.tensor(list(TEXT.encode()))
        self.windows = data[: len(data) // 34 * 34].view(-1, 34)

    def loss(self, step: int) -> Tensor:
        places = torch.arange(4 * step, 4 * step + 4) % len(self.windows)
        rows = self.windows[places.chunk(self.share[1])[self.share[0]]]
        logits = self.model(rows[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 3:].flatten())

    def backward(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()

    def run(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.backward(step)
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def snapshot(optimizer: optim.SubspaceOptimizer) -> list[Any]:
    """All state values in a fixed order, tensors copied."""
    return [
        (name, value.clone() if isinstance(value, Tensor) else value)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, value in sorted(optimizer.state[parameter].items())
    ]


def same(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Bitwise equality of nested lists of tensors and numbers."""
    for a, b in zip(first, second, strict=True):
        if isinstance(a, (tuple, list)):
            if not same(a, b):
                return False
        elif isinstance(a, Tensor):
            if not (a.dtype == b.dtype and torch.equal(a, b)):
                return False
        elif a != b:
            return False
    return True
