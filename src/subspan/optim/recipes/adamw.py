"""AdamW: the plain baseline, through the same engine."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.registry import recipe


@recipe(
    "adamw",
    paper="Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2017, arXiv 1711.05101",
    lr=1e-3,
    weight_decay=1e-2,
    memory="2mn",
    evidence=("record: torch_adamw", "limit: equals torch.optim.AdamW"),
)
def AdamW(
    *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, convention: str = "torch"
) -> Composition:
    """AdamW on every parameter, without a subspace.

    Args:
        betas: averaging rates of the moments.
        eps: added to the root of the second moment.
        convention: "torch", "hf" or "bitsandbytes", see `subspan.optim.parts.inner.Adam`.
    """
    return Composition(inner=Adam(betas, eps, convention))  # type: ignore[arg-type]
