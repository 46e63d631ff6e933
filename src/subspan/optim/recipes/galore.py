"""GaLore: Adam on the gradient projected on its own leading singular vectors."""

from __future__ import annotations

from dataclasses import replace

from subspan.optim.composition import Composition
from subspan.optim.parts.adafactor import Adafactor
from subspan.optim.parts.inner import Adam, Inner
from subspan.optim.parts.output import Lift
from subspan.optim.parts.refresh import Every
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, RandomizedSVD, resolve_finder


@recipe(
    "galore",
    paper="Zhao et al.: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, "
    "2024, arXiv 2403.03507",
    lr=1e-2,
    memory="rm + 2rn (+ full moments of what is not projected)",
    evidence=(
        "record: galore_adamw_{std,reverse_std,left,right,full}, _std_wd0.1, "
        "galore_adafactor{,_beta1,_scaleparam}, galore_adamw8bit_states{8,32}",
        "limit: full rank in the identity basis is AdamW; at full rank with SGD inside, the basis "
        "does not matter",
        "law: the basis captures at least 99.5 % of the exact one's energy",
    ),
    departures=(
        "The default finder is a warm-started randomised SVD; finder='svd' is the published one.",
        "Signs of a new basis are aligned with the old one; LAPACK's arbitrary signs mirror kept "
        "moments.",
        "A zero gradient at a refresh keeps the old basis and looks again at the next step.",
        "Adafactor rejects relative_step: the learning rate is always given.",
    ),
)
def GaLore(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    inner: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    correct_bias: bool = True,
    convention: str = "hf",
    beta1: float | None = None,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    scale_parameter: bool = False,
    stagger: bool = False,
    finder: str | Finder = "randomized",
) -> Composition:
    """Adam (or Adafactor) on the gradient's projection on its leading singular vectors.

        R = project(G);  N = Adam(R);  W <- W - lr scale lift(N)

    The vectors are found anew every gap steps. The moments are kept over a refresh although their
    coordinates change.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes (200; 500 at 7B).
        scale: factor on the lifted update; with `lr` the step of projected matrices is
            `lr * scale`.
        proj_type: std compresses the smaller dimension; reverse_std, left, right, full.
        inner: "adamw" or "adafactor".
        betas: averaging rates (adamw).
        eps: added to the root of the second moment; None: 1e-6 ("hf"), 1e-8 otherwise (adamw).
        correct_bias: correct the moments' bias (adamw).
        convention: place of eps and decay, "hf" (the released AdamW), "torch", or "bitsandbytes"
            (its 8-bit AdamW).
        beta1: rate of the first moment (adafactor); None keeps none.
        clip_threshold: largest root mean square of the step inside the subspace (adafactor).
        decay_rate: exponent of the second moment's rate (adafactor).
        scale_parameter: multiply lr with max(1e-3, rms(W)) (adafactor).
        stagger: spread the refreshes of different matrices over the gap.
        finder: "randomized" (warm-started randomised SVD), "svd" (exact, as published), or any
            `Finder`.
    """
    core, plain = galore_inner(
        inner, betas, eps, correct_bias, convention, beta1, clip_threshold, decay_rate
    )
    return Composition(
        inner=core,
        plain=plain,
        finder=resolve_finder(finder, RandomizedSVD()),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, stagger=stagger),
        output=Lift(scale),
        parameter_scale=1e-3 if inner == "adafactor" and scale_parameter else None,
    )


def galore_inner(
    inner: str,
    betas: tuple[float, float],
    eps: float | None,
    correct_bias: bool,
    convention: str,
    beta1: float | None,
    clip_threshold: float,
    decay_rate: float,
) -> tuple[Inner, Inner]:
    """The inner optimizer on the coordinates, and the one for what is not projected.

    Raises:
        ValueError: if `inner` is neither "adamw" nor "adafactor".
    """
    if inner == "adafactor":
        core = Adafactor(beta1, clip_threshold=clip_threshold, decay_rate=decay_rate)
        return core, core
    if inner != "adamw":
        raise ValueError(f"inner={inner!r} is not known: use adamw or adafactor")
    if eps is None:
        eps = 1e-6 if convention == "hf" else 1e-8
    adam = Adam(betas, eps, convention, correct_bias)  # type: ignore[arg-type]
    return adam, replace(adam, convention="torch") if convention == "bitsandbytes" else adam
