"""Which dtype a computation runs in."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and accumulated.

    float64 stays float64; every other floating dtype (float32, bfloat16, float16, float8) becomes
    float32.

    Raises:
        TypeError: `dtype` is not a real floating dtype.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating dtype, got {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32.

    Raises:
        TypeError: a tensor is not of a real floating dtype.
    """
    dtypes = [compute_dtype(tensor.dtype) for tensor in tensors]
    return torch.float64 if torch.float64 in dtypes else torch.float32
