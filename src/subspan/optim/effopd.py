"""EffOPD: now and then, go on in the direction that training has taken, as long as a score rises.

Learning to Foresee (code caiyuchen-ustc/EffOPD). At the steps 1, 2, 4, 8, ... of any optimizer,
with `delta = W - W_base` the way since the last of them,

    W_j = W + alpha j delta,  j = 1, 2, ... at most `attempts`

is tried on the attention and MLP weights, all together, while `score()` rises strictly; the last
accepted one stays and becomes W_base. With the published `alpha = 2` the candidates are
`W_base + 3 delta`, `W_base + 5 delta`, ...: odd multiples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from subspan.linalg import compute_dtype
from subspan.optim.bucket import is_quantised
from subspan.optim.selection import is_projected_by_name

_KEY = "effopd"


class EffOPD(torch.optim.Optimizer):
    """Wraps an optimizer and extrapolates its weights at steps that are powers of two.

        optimizer = subspan.optim.EffOPD(optimizer, score=lambda: -validation_loss(model))

    Everything else is the wrapped optimizer's: param groups (so schedulers work on either), state,
    which extrapolation does not touch, and `zero_grad`. Learning rate schedules are not told of it.

    Two copies of the extrapolated weights are held at an extrapolation, one otherwise.

    Args:
        optimizer: any torch optimizer; its parameters are those of the model by identity.
        score: called without arguments and without gradients; higher is better. It should be the
            same function of the weights at every call of one step (fixed samples, greedy
            decoding), and on every process.
        parameters: the weights to extrapolate. None: matrices of the optimizer that are no
            embedding, output head or norm by name (all matrices, if it was given no names).
        alpha: length of an attempt, relative to delta.
        attempts: most candidates per extrapolation.

    Raises:
        ValueError: no parameter is left to extrapolate, one is held in int8, or a value is not
            allowed.

    Notes:
        The released code steps from one candidate to the next and rounds each to the weights'
        dtype; here every candidate is computed in float32 from W and W_base, so nothing adds up and
        a rejected one is undone exactly.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        score: Callable[[], float],
        parameters: Iterable[Tensor] | None = None,
        *,
        alpha: float = 2.0,
        attempts: int = 5,
    ) -> None:
        # Nothing of the base class is set up: groups, state and defaults are the wrapped one's.
        if not alpha > 0:
            raise ValueError(f"alpha={alpha!r} must be positive")
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise ValueError(f"attempts={attempts!r} must be an integer of at least 1")
        self.optimizer = optimizer
        self.score = score
        self.alpha, self.attempts = alpha, attempts
        self.steps = 0
        self.history: list[tuple[int, int, float]] = []
        chosen = None if parameters is None else list(parameters)
        self._chosen_by_name = chosen is None
        self._weights = self._select(optimizer.param_groups) if chosen is None else chosen
        if not self._weights:
            raise ValueError("no parameter is left to extrapolate: pass parameters=")
        self._refuse_quantised(self._weights)
        self._base = [weight.detach().clone() for weight in self._weights]

    @staticmethod
    def _select(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
        names = (group.get("param_names") or [""] * len(group["params"]) for group in groups)
        pairs = (zip(n, g["params"], strict=True) for n, g in zip(names, groups, strict=True))
        return _matrices(chain.from_iterable(pairs))

    @staticmethod
    def _refuse_quantised(weights: Iterable[Tensor]) -> None:
        if any(is_quantised(weight) for weight in weights):
            raise ValueError(
                "a parameter is held in int8, which extrapolated weights would be rounded to: use "
                "`subspan.layers.dequantise_linear` first"
            )

    # ------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer, and an extrapolation if it is time for one.

        Args:
            closure: handed to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returns.
        """
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        if self.steps & (self.steps - 1) == 0:
            self._extrapolate()
        return result

    @torch.no_grad()
    def _extrapolate(self) -> None:
        start = [weight.detach().clone() for weight in self._weights]
        best, accepted = float(self.score()), 0
        while accepted < self.attempts:
            self._move(start, accepted + 1)
            value = float(self.score())
            if not value > best:
                self._move(start, accepted)
                break
            best, accepted = value, accepted + 1
        for base, weight in zip(self._base, self._weights, strict=True):
            base.copy_(weight)
        self.history.append((self.steps, accepted, best))

    def _move(self, start: Sequence[Tensor], number: int) -> None:
        """Set the weights to the candidate of that number; 0 is where they were."""
        for weight, begin, base in zip(self._weights, start, self._base, strict=True):
            if number == 0:
                weight.copy_(begin)
                continue
            dtype = compute_dtype(weight.dtype)
            here = begin.to(dtype)
            weight.copy_(here + (here - base.to(dtype)) * (self.alpha * number))

    # ------------------------------------------------------------------ the wrapped optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer.

        If weights are chosen by name, its matrices are extrapolated, too, from where they are now.

        Raises:
            ValueError: if one of them is held in int8.
        """
        given = param_group["params"]
        param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
        if self._chosen_by_name:
            pairs = [
                item if isinstance(item, tuple) else ("", item) for item in param_group["params"]
            ]
            self._refuse_quantised(_matrices(pairs))
        self.optimizer.add_param_group(param_group)
        if self._chosen_by_name:
            late = self._select(self.optimizer.param_groups[-1:])
            self._weights += late
            self._base += [weight.detach().clone() for weight in late]

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the extrapolation's own under "effopd"."""
        own = {
            "steps": self.steps,
            "history": [list(entry) for entry in self.history],
            "base": [base.clone() for base in self._base],
        }
        return {**self.optimizer.state_dict(), _KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the checkpoint has no extrapolation, or one of other weights; nothing has
                been changed then.
        """
        own = state_dict.get(_KEY)
        if own is None:
            raise ValueError(
                "the checkpoint was written without EffOPD: load it into the wrapped optimizer, "
                "which starts extrapolating from the present weights"
            )
        shapes = [tuple(base.shape) for base in own["base"]]
        expected = [tuple(base.shape) for base in self._base]
        if shapes != expected:
            raise ValueError(
                f"the checkpoint extrapolates weights of shapes {shapes}, this optimizer {expected}"
            )
        rest = {key: value for key, value in state_dict.items() if key != _KEY}
        self.optimizer.load_state_dict(rest)
        self.steps = own["steps"]
        self.history = [(step, accepted, value) for step, accepted, value in own["history"]]
        for base, saved in zip(self._base, own["base"], strict=True):
            base.copy_(saved)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the wrapped optimizer has, step hooks among it."""
        if "optimizer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies; without the wrapper that a scheduler puts around `step`."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For pickling and deep copies."""
        self.__dict__.update(state)

    def __repr__(self) -> str:
        """The wrapped optimizer, and how it is extrapolated."""
        return f"EffOPD({self.optimizer!r}, alpha={self.alpha}, attempts={self.attempts})"


def _matrices(pairs: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    return [p for name, p in pairs if p.dim() >= 2 and is_projected_by_name(name)]
