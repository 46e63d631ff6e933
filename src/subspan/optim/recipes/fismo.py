"""FISMO: orthogonalised momentum in the geometry of a Kronecker-factored Fisher matrix."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.fismo import FISMO as FISMOInner
from subspan.optim.parts.inner import Adam
from subspan.optim.registry import recipe


@recipe(
    "fismo",
    paper="Xu, Yan, Zhang: FISMO: Fisher-Structured Momentum-Orthogonalized Optimizer, 2026, "
    "arXiv 2601.21750",
    lr=1e-3,
    memory="mn + m² + n²; + m² + n² more with root_interval > 1 (+ 2 per entry of what AdamW "
    "trains)",
    evidence=(
        "record: ref_fismo, a float64 transcription of the published algorithm (no code was "
        "released)",
        "limit: gamma 1 is Muon without Nesterov's step",
        "law: the step is equivariant under rotations of rows and columns",
    ),
    departures=(
        "Values of gamma, damping, lr and the start P = Q = I were not found in the paper's "
        "summaries; the defaults are choices within its stated ranges.",
        "Eigenvalues of a factor below the rounding error of its largest are raised to it.",
        "Directions of zero momentum get no step from polar='svd'.",
    ),
)
def FISMO(
    *,
    momentum: float = 0.95,
    gamma: float = 0.95,
    damping: float = 0.1,
    polar: str = "newton_schulz",
    ns_steps: int = 5,
    root_interval: int = 1,
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
) -> Composition:
    """Muon on the gradient whitened by running row and column factors of the Fisher matrix.

        P <- m/tr(.) (gamma P + (1 - gamma) (G Q^-1 G^T / n + damping I)), then Q with the new P
        M <- momentum M + (1 - momentum) P^-1/2 G Q^-1/2
        W <- W (1 - lr weight_decay) - lr P^-1/2 Polar(M) Q^-1/2

    Three symmetric eigenproblems per matrix and step (two per interval with kept roots), so
    O(m³ + n³): use `root_interval` 10 to 100 beyond small models. Eigenproblems run in the
    precision of the weights' arithmetic (float32 for float32 and bf16). What is no block matrix is
    trained by AdamW with the same learning rate (`plain_lr` in `for_model`).

    Args:
        momentum: averaging rate of the whitened gradient (0.9 to 0.95).
        gamma: averaging rate of the factors (0.95 to 0.99).
        damping: multiple of the identity that joins every sample of a factor (1e-3 to 0.1).
        polar: "newton_schulz" (Muon's iteration) or "svd" (exact).
        ns_steps: Newton-Schulz iterations.
        root_interval: steps between computations of the inverse roots.
        adam_betas: averaging rates of AdamW.
        adam_eps: added to the root of AdamW's second moment.
    """
    inner = FISMOInner(momentum, gamma, damping, polar, ns_steps, root_interval)  # type: ignore[arg-type]
    return Composition(inner=inner, plain=Adam(adam_betas, adam_eps))
