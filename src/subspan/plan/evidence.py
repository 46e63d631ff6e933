"""What is known of the methods' quality, for ranking plans that fit.

Validation losses after 200 steps of one small job with one seed (configs/every-recipe.yaml, where
the conditions stand). That is weak evidence: it tells methods that train well from those that lag
behind, and nothing about small differences.
"""

from __future__ import annotations

LOSSES = {
    "grasswalk": 5.009,
    "subtrack_pp": 5.013,
    "ldadam": 5.051,
    "subspace_momentum": 5.102,
    "frugal": 5.103,
    "muon": 5.110,
    "polynomial": 5.121,
    "fismo": 5.122,
    "subset_norm_subspace_momentum": 5.135,
    "hybrid_auon": 5.144,
    "adamw": 5.152,
    "swats": 5.154,
    "coap": 5.157,
    "galore_plus": 5.167,
    "subset_norm": 5.172,
    "q_galore": 5.176,
    "sara": 5.176,
    "fira": 5.182,
    "galore": 5.185,
    "galore2": 5.185,
    "tensor_galore": 5.185,
    "auon": 5.199,
    "trion": 5.200,
    "dct_adamw": 5.217,
    "grassjump": 5.236,
    "gum": 5.269,
    "badam": 5.274,
    "online_subspace_descent": 5.290,
    "apollo": 5.442,
    "apollo_mini": 5.789,
    "flora": 5.893,
    "sgd": 6.395,
}

# Shares of AdamW's loss by which a method may lie above it.
TIERS = (0.01, 0.04)

RULE = (
    "first methods whose loss after 200 steps of our small job is within 1 % of AdamW's, then "
    "within 4 %, then the rest (configs/every-recipe.yaml: one seed, weak evidence); then the "
    "fewest compromises; of equals AdamW itself, then the smaller loss"
)


def tier(method: str) -> int:
    """0 for methods about as good as AdamW or better, and so on; unknown ones come last."""
    loss = LOSSES.get(method)
    if loss is None:
        return len(TIERS)
    above = loss / LOSSES["adamw"] - 1
    return next((place for place, share in enumerate(TIERS) if above <= share), len(TIERS))
