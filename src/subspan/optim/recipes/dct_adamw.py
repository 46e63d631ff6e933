"""DCT-AdamW: AdamW on chosen columns of a discrete cosine transform."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import Discard, ErrorFeedback
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import Keep, Rotate
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, resolve_finder
from subspan.subspaces.finders_fixed import TopColumns


@recipe(
    "dct_adamw",
    paper="Modoranu et al.: SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language "
    "Models (later: FFT-based Dynamic Subspace Selection), 2025, arXiv 2505.17967",
    lr=1e-3,
    memory="2rn + r indices, + mn with error feedback; one m x m matrix shared by all layers of a "
    "width",
    evidence=(
        "record: dct_adamw_{plain,gap,ef_rotate,ef_rotate_gap,l2_ef_rotate,makhoul_ef_rotate,"
        "randqr_ef_rotate}; with the released quantisers, and moments that start again, "
        "ef8_rotate, ef4_rotate",
        "record: the published formulas in float64",
        "law: chosen are the columns of largest norm; what stays chosen keeps its slot and moments",
        "limit: at full rank it is AdamW in the basis of all cosines",
    ),
    departures=(
        "Error feedback and rotation are on, as in the paper; the code's constructor has both off.",
        "Columns that stay chosen keep their slots, so rotate=False mixes nothing but new columns "
        "with the moments of those they replace. The code orders slots as topk happens to.",
        "Moments are copied from slot to slot, and new columns start from exactly zero. The code "
        "multiplies by a matrix that is 0 and 1 up to rounding and writes the product over the "
        "moments while reading them, which leaves nothing but zeros on some machines, that of the "
        "recordings among them.",
        "The error is quantised to 255 or 15 levels by storage={'error': 'rows8'} or 'rows4'. The "
        "code's 8-bit form has 16 levels and its 4-bit form returns entries permuted: "
        "'rows8-released' and 'rows4-released'.",
        "The smaller dimension is compressed for every shape (the code: the larger one of two "
        "hard-coded shapes), matrices of any size are, and one optimizer serves all widths.",
        "The code's negative norms, which weigh by the norms of the columns, are not offered.",
    ),
)
def DCTAdamW(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 1,
    error_feedback: bool = True,
    rotate: bool = True,
    matrix: str = "dct3",
    norm: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    proj_type: str = "std",
    finder: str | Finder = "dct",
) -> Composition:
    """AdamW on the r cosines with which the gradient agrees most, chosen by one fast transform.

        A = G + E;  S = A Q;  I = the r columns of S with the largest norm;  R = S_I
        moments follow their columns;  E = A - R Q_I^T;  W <- W - lr Adam(R) Q_I^T

    Args:
        rank: columns in use, or a fraction of the smaller dimension; None for a plain group.
        update_proj_gap: steps between choices, at steps 1, gap, 2 gap, ...
        error_feedback: add what the projection lost to the next gradient.
        rotate: moments follow their columns and new ones start from zero; False: new columns take
            over the moments of those they replace.
        matrix: Q: "dct3" (the paper's), "dct2" (its transpose) or "random".
        norm: 1 or 2, of the columns of S.
        betas: averaging rates.
        eps: added to the root of the second moment after the bias correction.
        proj_type: std, reverse_std, left or right.
        finder: "dct", or any `Finder`.
    """
    return Composition(
        inner=Adam(betas, eps),
        finder=resolve_finder(finder, TopColumns(matrix, norm)),  # type: ignore[arg-type]
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, phase=0),
        transport=Rotate() if rotate else Keep(),
        remainder=ErrorFeedback(momentum=False) if error_feedback else Discard(),
    )
