"""Linear layers that train with less memory: int8 weights, low-rank backward passes."""

from .quantised import QuantisedLinear, dequantise_linear, quantise_linear
from .quantised_weight import QuantisedWeight
from .walsh_hadamard import WalshHadamardLinear, lbp_wht

__all__ = [
    "QuantisedLinear",
    "QuantisedWeight",
    "WalshHadamardLinear",
    "dequantise_linear",
    "lbp_wht",
    "quantise_linear",
]
