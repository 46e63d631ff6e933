"""Pure tensor functions: bases of subspaces, products, transforms, random draws, rounding.

Everything is batched over leading dimensions, runs on any device, and computes in float32 for lower
precisions and in float64 for float64.
"""

from .dct import dct, dct_basis
from .dtypes import common_dtype, compute_dtype
from .factors import sketched_basis, top_bases, top_basis
from .newton_schulz import newton_schulz
from .orthonormal import householder_basis, orthonormalise
from .products import add_product_, add_scaled_, product
from .random import (
    derive_seed,
    gaussian,
    gaussian_basis,
    generator,
    next_seed,
    random_coordinates,
    random_orthogonal,
    random_permutation,
    split_seed,
)
from .rounding import stochastic_round_
from .shapes import Side, check_matrix, check_rank, check_side, side_size

__all__ = [
    "Side",
    "add_product_",
    "add_scaled_",
    "check_matrix",
    "check_rank",
    "check_side",
    "common_dtype",
    "compute_dtype",
    "dct",
    "dct_basis",
    "derive_seed",
    "gaussian",
    "gaussian_basis",
    "generator",
    "householder_basis",
    "newton_schulz",
    "next_seed",
    "orthonormalise",
    "product",
    "random_coordinates",
    "random_orthogonal",
    "random_permutation",
    "side_size",
    "sketched_basis",
    "split_seed",
    "stochastic_round_",
    "top_bases",
    "top_basis",
]
