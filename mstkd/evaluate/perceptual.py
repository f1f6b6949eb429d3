"""LPIPS, where it is installed: the distance of two images in the features of AlexNet (Zhang et al., CVPR 2018).

The package `lpips` brings its own weights but not AlexNet's, which torchvision would download. Nothing is downloaded
here: without that file in torch's cache there is no LPIPS.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], list[float]]  # of images (K, S, S) in [0, 1], slice by slice


def perceptual_distance(device: torch.device) -> Distance | None:
    """LPIPS with AlexNet, grey images repeated to three channels in [-1, 1]; None where package or weights are not installed."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if find_spec("lpips") is None or find_spec("torchvision") is None or not any(cache.glob("alexnet-*.pth")):
        return None
    from torchvision.models import AlexNet_Weights

    if not (cache / Path(AlexNet_Weights.IMAGENET1K_V1.url).name).is_file():
        return None
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # torchvision's, about how lpips calls it
        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    def distance(image: Tensor, truth: Tensor) -> list[float]:
        with torch.no_grad():
            both = ((2 * images - 1)[:, None].expand(-1, 3, -1, -1).to(device) for images in (image, truth))
            return network(*both).flatten().tolist()

    return distance
