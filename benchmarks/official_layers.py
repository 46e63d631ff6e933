"""Authors' code of layers, as opposed to optimizers: LBP-WHT's linear layer."""

from __future__ import annotations

from torch import nn

from benchmarks.official_code import from_repository


def lbp_wht_linear(
    in_features: int,
    out_features: int,
    *,
    shape: tuple[int, int],
    order: int = 8,
    triangle: int = 3,
) -> nn.Module:
    """LBP-WHT's layer with exact forward and low-rank backward.

    Args:
        in_features, out_features: as in `nn.Linear`; there is a bias.
        shape: (rows, columns) of the image whose tokens the input lists: batch x tokens x features.
        order: side of the patches that are transformed.
        triangle: coefficients (i, j) with i + j < triangle are kept: triangle*(triangle + 1)/2.
    """
    module = from_repository("LBP-WHT", "custom_op.linear_wht", bare="custom_op")
    options = {"lp_tri_order": triangle}
    return module.LinearWHT(
        in_features, out_features, order=order, shape=shape, activate=True, extra_cfg=options
    )
