"""BAdam: Adam on one block of layers at a time."""

from __future__ import annotations

from subspan.optim.composition import Composition
from subspan.optim.parts.activity import LayerBlocks
from subspan.optim.parts.inner import Adam
from subspan.optim.registry import recipe


@recipe(
    "badam",
    paper="Luo, Yu, Li: BAdam: A Memory Efficient Full Parameter Optimization Method for Large "
    "Language Models, 2024, arXiv 2404.02827",
    lr=1e-5,
    memory="2mn of the active block, nothing of the others (which have no gradient either)",
    evidence=(
        "record: badam_{ascending,descending,random}",
        "limit: one block of everything is AdamW restarted every switch_block_every steps",
    ),
    departures=(
        "Low-precision weights are updated in float32 and rounded stochastically; the released "
        "code keeps a float32 copy of the active block and rounds to nearest.",
        "Every block gets the same number of steps; first_short=True gives the first one less, as "
        "released.",
        "The turn and the random order are functions of the step and `seed`, so a resumed run goes "
        "on where it was; the released code starts from its first block again.",
        "Blocks are found by a layer's number; the released code compares text, so that "
        "'layers.1' may also mean 'layers.10'.",
        "Weight decay acts on every active parameter, biases and norms included, as it does in the "
        "released code against its intention.",
        "others='adamw' keeps the moments of what is always active; the released active_modules "
        "lose theirs at every switch.",
    ),
)
def BAdam(
    *,
    switch_block_every: int = 50,
    switch_mode: str = "descending",
    blocks: tuple[tuple[str, ...], ...] | None = None,
    others: str = "frozen",
    first_short: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
) -> Composition:
    """AdamW on one block of the model, usually a layer, and on another one after some steps.

    Its moments start afresh with its turn. All parameters of other blocks rest: their
    `requires_grad` is off, so neither gradients nor states of them exist, and backpropagation ends
    at the active block. `for_model` gives all of a model to it; a param group by itself has its own
    turns, and one with `project=False` is trained by AdamW in every step.

    Reentrant gradient checkpointing needs inputs that require a gradient
    (`model.enable_input_require_grads()` in transformers) while the embedding rests;
    DistributedDataParallel must be told to find unused parameters.

    Args:
        switch_block_every: steps per block (50 to 100; the paper suggests samples / (batch size x
            blocks) within these bounds).
        switch_mode: "descending", "ascending", or "random" (a new permutation in every round).
        blocks: every tuple of regular expressions is a block, such as `((r"embed",),
            (r"layers\\.0\\.", r"layers\\.1\\."))`; None: one per transformer layer, or per tensor
            in a model without numbered layers.
        others: what is in no block is "frozen", or trained by "adamw" in every step.
        first_short: the first block gets one step less.
        betas: averaging rates of the moments.
        eps: added to the root of the second moment after the bias correction.
        seed: of the random order.
    """
    activity = LayerBlocks(switch_block_every, switch_mode, blocks, others, first_short, seed)  # type: ignore[arg-type]
    return Composition(inner=Adam(betas, eps), activity=activity)
