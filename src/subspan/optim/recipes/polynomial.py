"""Polynomial preconditioning: gradient steps that the largest curvatures no longer hold back."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.polynomial import Curvature
from subspan.optim.parts.polynomial import Polynomial as PolynomialInner
from subspan.optim.registry import recipe


@recipe(
    "polynomial",
    paper="Doikov, Rodomanov: Polynomial Preconditioning for Gradient Methods, 2023, "
    "arXiv 2301.13194",
    lr=1e-2,
    memory="min(m, n)²; nothing with a given curvature, which is the caller's, but the k² of its "
    "preconditioner (+ 2 per entry of what AdamW trains)",
    evidence=(
        "law: P_1 = tr(B) I - B, P_{k-1} = det(B) B^-1, and its eigenvalues are the elementary "
        "symmetric polynomials of the others",
        "law: the Krylov form solves the paper's linear system",
        "behaviour: with `degree` outliers a quadratic converges with the condition number of the "
        "rest",
        "limit: degree 0 is gradient descent with step lr / lambda_max(B)",
    ),
    departures=(
        "Without a given curvature matrices use the running Gram matrix of the gradient on their "
        "short side, which the paper does not.",
        "A fixed lr over a bound of lambda_max(P B) takes the place of the paper's line search; "
        "of its methods this is the gradient method, not the fast one.",
        "The Krylov form runs conjugate gradients rather than solving the ill-conditioned system.",
    ),
)
def Polynomial(
    *,
    degree: int = 2,
    form: str = "symmetric",
    curvature: Curvature | None = None,
    beta: float = 0.99,
    damping: float = 1e-3,
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
) -> Composition:
    """Gradient descent preconditioned by a polynomial of a curvature matrix B.

        W <- W - lr P(B) G / lambda_max(P(B) B)

    Degree t removes the t largest eigenvalues of B from the condition number, at the price of t
    products. Parameters without curvature are trained by AdamW with the same learning rate
    (`plain_lr` in `for_model`).

    Args:
        degree: of the polynomial.
        form: "symmetric", or "krylov" for the best polynomial for every gradient.
        curvature: `Curvature({name: matrix or function})` of the parameters to be trained so; with
            it lr is 1/L where the Hessian is at most L B, 1 for a quadratic with Hessian B. None:
            the running Gram matrix of the gradient, for block matrices; lr is then of the order of
            AdamW's.
        beta: averaging rate of that Gram matrix.
        damping: multiple of its mean eigenvalue that is added to it.
        adam_betas: averaging rates of AdamW.
        adam_eps: added to the root of AdamW's second moment.
    """
    inner = PolynomialInner(degree, form, curvature, beta, damping)  # type: ignore[arg-type]
    return Composition(inner=inner, plain=Adam(adam_betas, adam_eps))
