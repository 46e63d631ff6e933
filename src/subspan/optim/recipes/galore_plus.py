"""GaLore+: GaLore with one head's subspace for all heads, and a sparse residual. Experimental."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Discard, Lift, Remainder
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.sparse import SparseMoments
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, resolve_finder
from subspan.subspaces.finders_sampled import HeadSketch


@recipe(
    "galore_plus",
    paper="Liao et al.: GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection, "
    "2024, arXiv 2412.19820",
    lr=1e-4,
    memory="rm + 2rn + 3 density mn",
    evidence=(
        "law: heads that share a subspace are captured by the one that is sketched; the sparse "
        "part is Adam on the entries of the residual that were largest in the warm-up",
        "limit: density 0 and no heads is GaLore",
    ),
    departures=(
        "Experimental: reconstructed from the abstract and reviews; no code is public. How the "
        "index set is built, the number of iterations, and what the sparse moments hold are our "
        "reading.",
        "An output projection shares heads only with its basis on the left (proj_type='left' in a "
        "group of its own); on the right it is sketched whole.",
    ),
)
def GaLorePlus(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    head_dim: int = 128,
    density: float = 0.01,
    warmup: int = 10,
    power_iterations: int = 1,
    proj_type: str = "std",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    stagger: bool = False,
    finder: str | Finder | None = None,
) -> Composition:
    """GaLore whose refresh looks at one attention head, with Adam on a few entries of the residual.

    Reconstructed from the abstract and reviews, and experimental. One random head's rows of a
    query, key or value gradient give the basis of all heads. During the first `warmup` steps the
    entries with the largest residual are collected; from then on they have moments of their own.

        R = project(G);  W <- W - lr scale (lift(Adam(R)) + Adam_sparse((G - lift(R))_I))

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension; None for a plain
            group.
        update_proj_gap: steps between refreshes.
        scale: factor on the update.
        head_dim: features per attention head.
        density: share of the residual's entries with moments; 0 drops the residual.
        warmup: steps in which they are collected.
        power_iterations: rounds of subspace iteration beyond the first at a cold start.
        proj_type: std, reverse_std, left or right.
        betas: averaging rates.
        eps: added to the root of the second moment before the bias correction.
        stagger: spread the refreshes of different matrices over the gap.
        finder: None for the one above, or any `Finder`.
    """
    own = HeadSketch(head_dim, power_iterations=power_iterations)
    remainder: Remainder = Discard()
    if density != 0:
        remainder = SparseMoments(density, warmup, betas, eps)
    return Composition(
        inner=Adam(betas, eps, "hf"),
        finder=own if finder is None else resolve_finder(finder, own),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, stagger=stagger),
        output=Lift(scale),
        remainder=remainder,
    )
