"""COAP: GaLore with a basis that is nudged along a gradient and seldom recomputed."""

from __future__ import annotations

from dataclasses import replace

from subspan.optim.composition import Composition
from subspan.optim.parts.activity import check_gap
from subspan.optim.parts.output import Lift
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import Keep, Reproject
from subspan.optim.recipes.galore import galore_inner
from subspan.optim.registry import recipe
from subspan.subspaces.finders import Finder, resolve_finder
from subspan.subspaces.finders_coap import CoapNudge
from subspan.subspaces.finders_coap_tucker import CoapTuckerNudge


@recipe(
    "coap",
    paper="Xiao et al.: COAP: Memory-Efficient Training with Correlation-Aware Gradient "
    "Projection, 2024, arXiv 2412.00071",
    lr=1e-3,
    memory="rm + 2rn (rm + r + n, + rn with beta1, for Adafactor)",
    evidence=(
        "record: coap_adamw{,_restore,8bit}, coap_adamw_conv{,_restore}",
        "record: coap_adafactor{,_restore}, with recorded bases and with "
        "bases of its own (sketch_seed=3407)",
        "law: the nudge is the derivative that autograd takes of the published loss; at the best "
        "subspace without momentum it vanishes",
        "limit: a recomputation at every refresh is GaLore with one pass of randomised SVD",
    ),
    departures=(
        "The Gaussian matrix of the first basis derives from `seed` and differs between "
        "parameters; sketch_seed=3407 draws the code's, the same for all of them.",
        "Signs of a recomputed basis are aligned with the old one. The code takes LAPACK's, which "
        "mirror kept moments, and with restore_state mix up the second one, whose root is turned "
        "as if it had a sign.",
        "Adafactor without a first moment nudges by the reconstruction error alone; the code "
        "crashes. restore_state then has nothing to restore and is refused.",
        "A rank above the smaller dimension means full rank; the code trains such matrices "
        "plainly. A fraction is rounded to the nearest rank; the code's rank_ratio_matrix rounds "
        "down.",
        "Kernels of one pixel have a factor on both channel modes as larger ones have; the code "
        "gives them one on the output channels only.",
    ),
)
def COAP(
    *,
    rank: int | float | None = 128,
    update_proj_gap: int = 32,
    reproject_factor: int = 5,
    scale: float = 1.0,
    restore_state: bool = False,
    proj_type: str = "std",
    inner: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    correct_bias: bool = True,
    beta1: float | None = None,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    scale_parameter: bool = False,
    nudge_lr: float = 0.1,
    sketch_seed: int | None = None,
    rank_ratio_cnn: float | None = 2.0,
    stagger: bool = False,
    finder: str | Finder = "coap",
    conv_finder: Finder | None = None,
) -> Composition:
    """Adam (or Adafactor) in a subspace that is improved by gradient descent instead of an SVD.

    Every gap steps the basis P takes one step on a loss that rewards reconstructing the gradient
    and agreeing with the first moment, and every `reproject_factor` gaps it is recomputed by one
    pass of randomised SVD from itself.

        loss = mean((lift(project(G)) - G)^2) (1 - mean_i cos(lift(M)_i, G_i))
        P <- P - nudge_lr clip(d loss / d P);  R = project(G);  W <- W - lr scale lift(Adam(R))

    P is not orthonormal between recomputations.

    Args:
        rank: dimension of the subspace, or a fraction of the smaller dimension (the inverse of the
            paper's compression ratio); None for a plain group.
        update_proj_gap: steps between refreshes (32; 40 and 100 for LLaMA 1B and 7B).
        reproject_factor: refreshes between recomputations.
        scale: factor on the lifted update (0.25 for LLaMA).
        restore_state: lift the moments with the old basis and project them on the new one; False
            keeps them as they are.
        proj_type: std, reverse_std, left or right.
        inner: "adamw" or "adafactor".
        betas: averaging rates (adamw).
        eps: added to the root of the second moment before the bias correction; None: 1e-6 (adamw).
        correct_bias: correct the moments' bias (adamw).
        beta1: rate of the first moment (adafactor); None keeps none.
        clip_threshold: largest root mean square of the step inside the subspace (adafactor).
        decay_rate: exponent of the second moment's rate (adafactor).
        scale_parameter: multiply lr with max(1e-3, rms(W)) (adafactor).
        nudge_lr: step size of the basis.
        sketch_seed: seed of the first basis for all parameters; None derives them from `seed`.
        rank_ratio_cnn: convolution kernels of more than 9216 entries keep `1 / sqrt(ratio)` of
            their output and input channels, smaller ones are trained plainly; None reads kernels
            as matrices.
        stagger: spread the refreshes of different matrices over the gap.
        finder: "coap", or any `Finder`, for matrices.
        conv_finder: replaces the finder of convolution kernels.
    """
    check_gap("update_proj_gap", update_proj_gap)
    check_gap("reproject_factor", reproject_factor)
    core, plain = galore_inner(
        inner, betas, eps, correct_bias, "hf", beta1, clip_threshold, decay_rate
    )
    reads_momentum = core.first_moment is not None
    recompute = update_proj_gap * reproject_factor
    own = CoapNudge(recompute, reads_momentum, nudge_lr, sketch_seed)
    matrices = Composition(
        inner=core,
        plain=plain,
        finder=resolve_finder(finder, own),
        rank=rank or 1,
        proj_type=proj_type,
        refresh=Every(update_proj_gap, stagger=stagger),
        transport=Reproject() if restore_state else Keep(),
        output=Lift(scale),
        parameter_scale=1e-3 if inner == "adafactor" and scale_parameter else None,
    )
    if rank_ratio_cnn is None:
        return matrices
    if not rank_ratio_cnn >= 1.0:
        raise ValueError(f"rank_ratio_cnn={rank_ratio_cnn!r} must be at least 1, or None")
    nudge = CoapTuckerNudge(recompute, reads_momentum, nudge_lr)
    kernels = replace(
        matrices,
        finder=nudge if conv_finder is None else resolve_finder(conv_finder, nudge),
        rank=rank_ratio_cnn**-0.5,
        proj_type="tucker",
        modes=2,
    )
    return replace(matrices, tensors=kernels, tensors_above=32 * 32 * 9)
