"""Stochastic gradient descent with momentum: the baseline below which nothing should fall."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.descent import SGD as Descent
from subspan.optim.registry import recipe


@recipe(
    "sgd",
    paper="Polyak: Some methods of speeding up the convergence of iteration methods, 1964; "
    "Sutskever et al.: On the importance of initialization and momentum in deep learning, 2013",
    lr=1e-1,
    memory="mn, nothing without momentum",
    evidence=("limit: it is torch.optim.SGD with decoupled weight decay",),
)
def SGD(*, momentum: float = 0.9, dampening: float = 0.0, nesterov: bool = False) -> Composition:
    """Stochastic gradient descent with heavy-ball or Nesterov momentum.

        M <- momentum M + (1 - dampening) G;  W <- W - lr M

    Args:
        momentum: 0 keeps no state.
        dampening: see above; not applied to the first gradient.
        nesterov: step along `G + momentum M`.
    """
    return Composition(inner=Descent(momentum, dampening, nesterov))
