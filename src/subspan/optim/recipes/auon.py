"""AuON and Hybrid-AuON: momentum divided by one number per matrix."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.auon import AuON as AuONInner
from subspan.optim.parts.inner import Adam
from subspan.optim.registry import recipe

_PAPER = (
    "Maity: AuON: A Linear-time Alternative to Orthogonal Momentum Updates, 2025, arXiv 2509.24320"
)
_DEPARTURES = (
    "The default is the paper's form, which divides the normalised momentum; as_released=True is "
    "the code's, which divides the momentum itself by a number that is 1 to three digits.",
    "Norms are taken per matrix; the code takes them over the whole of a tensor with more "
    "dimensions.",
    "Gradients are not changed; the code overwrites them.",
)


@recipe(
    "auon",
    paper=_PAPER,
    lr=0.055,
    memory="mn (+ 2 per entry of what AdamW trains)",
    evidence=(
        "record: auon (as_released=True)",
        "law: the paper's form does not depend on the gradient's scale, and its norm is "
        "sqrt(max(1, m/n)) to within 1/(mn)",
        "limit: as_released=True with gamma 0 is SGD with averaged Nesterov momentum",
    ),
    departures=_DEPARTURES,
)
def AuON(
    *,
    momentum: float = 0.95,
    gamma: float = 1.5,
    as_released: bool = False,
    adam_betas: tuple[float, float] = (0.8, 0.95),
    adam_eps: float = 1e-10,
) -> Composition:
    """Momentum of matrices, normalised and divided by the RMS of its hyperbolic cosine.

        M <- momentum M + (1 - momentum) G;  X = (1 - momentum) G + momentum M;  Z = X / ||X||_F
        W <- W (1 - lr weight_decay) - lr sqrt(max(1, m/n)) Z / rms(cosh(Z))

    Know what it is: entries of Z are of size 1/sqrt(mn), their cosh is 1 to three digits and more,
    so this is SGD with momentum and a step of fixed length. The released code (`as_released`)
    leaves out the normalisation, W <- W - lr X / rms(cosh(gamma Z)): SGD with averaged Nesterov
    momentum, whose learning rates (0.24 in its constructor, 0.08 in its scripts, weight decay
    0.01) do not carry over to the paper's form or back.

    What is no block matrix is trained by AdamW with the same learning rate unless its param group
    sets one (`plain_lr` in `for_model`; the released scripts use 0.008).

    Args:
        momentum: averaging rate.
        gamma: factor inside cosh (as_released).
        as_released: see above.
        adam_betas: averaging rates of AdamW.
        adam_eps: added to the root of AdamW's second moment.
    """
    inner = AuONInner(momentum, 0, gamma, as_released)
    return Composition(inner=inner, plain=Adam(adam_betas, adam_eps))


@recipe(
    "hybrid_auon",
    paper=_PAPER,
    lr=0.055,
    memory="mn (+ 2 per entry of what AdamW trains)",
    evidence=(
        "record: hybrid_auon_ns1, hybrid_auon_ns5 (as_released=True)",
        "law: the paper's form does not depend on the gradient's scale",
        "limit: as_released=True with gamma 0 is Muon without its shape factor",
    ),
    departures=(
        *_DEPARTURES,
        "One Newton-Schulz iteration as in the paper; the code takes five.",
    ),
)
def HybridAuON(
    *,
    momentum: float = 0.95,
    ns_steps: int = 1,
    gamma: float = 1.5,
    as_released: bool = False,
    adam_betas: tuple[float, float] = (0.8, 0.95),
    adam_eps: float = 1e-10,
) -> Composition:
    """AuON after a Newton-Schulz iteration, which evens out the singular values.

        X <- NewtonSchulz(X), then as `AuON`

    Args:
        momentum: averaging rate.
        ns_steps: iterations, in float32; 1 in the paper, 5 in the released code.
        gamma: factor inside cosh (as_released).
        as_released: divide NewtonSchulz(X) itself rather than its normalised form.
        adam_betas: averaging rates of AdamW.
        adam_eps: added to the root of AdamW's second moment.
    """
    inner = AuONInner(momentum, ns_steps, gamma, as_released)
    return Composition(inner=inner, plain=Adam(adam_betas, adam_eps))
