"""What autocast does to a linear layer, for layers whose product it does not see."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies `x`: autocast's where it is on, else its own."""
    device = x.device.type
    # The meta device, for one, has no autocast and must not be asked.
    available = torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
