"""Loss terms are computed in float32, whatever the networks' precision."""

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """A context without autocast on the device of `like`; what enters it is still to be made float32."""
    return torch.autocast(like.device.type, enabled=False)
