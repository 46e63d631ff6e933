"""Muon: momentum with its singular values brought near one."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.muon import Muon as MuonInner
from subspan.optim.registry import recipe


@recipe(
    "muon",
    paper="Jordan et al.: Muon: An optimizer for hidden layers in neural networks, 2024, "
    "https://kellerjordan.github.io/posts/muon",
    lr=1e-3,
    weight_decay=0.1,
    memory="mn (+ 2 per entry of what AdamW trains)",
    evidence=(
        "record: muon_torch_{original,match_rms,nonesterov}",
        "limit: dtype='bfloat16' takes the steps of torch.optim.Muon",
    ),
    departures=(
        "The iteration runs in float32 by default; dtype='bfloat16' is the arithmetic of "
        "torch.optim.Muon.",
        "Embeddings, heads, norms and vectors go to AdamW in the same optimizer; torch.optim.Muon "
        "refuses them. Convolution kernels are read as matrices, one row per output channel.",
    ),
)
def Muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    dtype: str = "float32",
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
) -> Composition:
    """Averaged gradients of matrices, their singular values brought near one by Newton-Schulz.

        M <- momentum M + (1 - momentum) G;  X = (1 - momentum) G + momentum M
        W <- W (1 - lr weight_decay) - lr f(m, n) NewtonSchulz(X)

    What is no block matrix (embeddings, heads, norms, vectors) is trained by AdamW with the same
    learning rate unless its param group sets one (`plain_lr` in `for_model`).

    Args:
        momentum: averaging rate.
        nesterov: step along X; False: along M.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: of the iteration.
        eps: lower bound of the norm that X is divided by first.
        adjust_lr_fn: f: "original" (None) `sqrt(max(1, m/n))`; "match_rms_adamw"
            `0.2 sqrt(max(m, n))`, with which AdamW's learning rate and weight decay can be kept;
            "none" for 1.
        dtype: arithmetic of the iteration, "float32" or "bfloat16".
        adam_betas: averaging rates of AdamW.
        adam_eps: added to the root of AdamW's second moment.
    """
    adjust = adjust_lr_fn or "original"
    inner = MuonInner(
        momentum,
        nesterov,
        ns_steps,
        adjust,  # type: ignore[arg-type]
        ns_coefficients,
        eps,
        dtype,  # type: ignore[arg-type]
    )
    return Composition(inner=inner, plain=Adam(adam_betas, adam_eps))
