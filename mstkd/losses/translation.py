"""The tumour image and what ties it to the whole slice in UTAD-Net (arXiv:2403.20168).

Pure functions of slices (B, 1, S, S) in [-1, 1], where -1 is the background, and masks (B, 1, S, S) bool.
"""

import torch.nn.functional as F
from torch import Tensor

BACKGROUND = -1.0


def tumour_image(image: Tensor, mask: Tensor) -> Tensor:
    """The slice inside the mask, exactly, and background around it."""
    return image.where(mask, BACKGROUND)


def local_consistency(made: Tensor, cropped: Tensor, real: Tensor, returned: Tensor) -> Tensor:
    """`mean |made - cropped| + mean |real - returned|` of tumour images.

    The generated one and the tumour image of the generated slice; that of the given slice and the one it comes back as.
    """
    return F.l1_loss(made, cropped) + F.l1_loss(returned, real)
