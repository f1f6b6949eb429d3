"""Whole-volume prediction by sliding window."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor

from mstkd.config import InferenceConfig
from mstkd.data.intensity import Intensity
from mstkd.subsets import Subset
from mstkd.methods import Method
from mstkd.shards.spec import SubjectMeta


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def evaluation_mode(method: Method) -> Iterator[None]:
    """Every network in eval mode and without gradient inside; each module's mode as it was afterwards."""
    training = {module: module.training for network in method.networks.values() for module in network.modules()}
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def predict_logits(
    method: Method, network: str, image: Tensor, available: Tensor, window: Sequence[int], inference: InferenceConfig
) -> Tensor:
    """Logits (1, K, X, Y, Z) of `network` for image (1, M, X, Y, Z), hidden sequences filled, and available (1, M) bool.

    Logits of windows are blended with Gaussian weights. Each axis of the image must be at least as long as the
    window's. Nothing is masked: a label outside the brain stays.
    """

    def logits(patch: Tensor) -> Tensor:
        with torch.autocast(patch.device.type, AUTOCAST.get(inference.precision), enabled=inference.precision in AUTOCAST):
            return method.predict(patch, available.expand(len(patch), -1), network).float()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence")  # MONAI's, about its own indexing
        return sliding_window_inference(image, tuple(window), inference.batch, logits, overlap=inference.overlap, mode="gaussian")


@dataclass(frozen=True)
class Volume:
    """A whole normalised case, padded to the window where it is smaller."""

    image: Tensor  # (1, M, X', Y', Z') float32
    present: Subset
    inner: tuple[slice, slice, slice]  # where the stored volume (X, Y, Z) lies in it


class Predictor:
    """A method's networks applied to whole volumes: normalisation, padding, window, hidden sequences."""

    def __init__(self, method: Method, sequences: Sequence[str], crop: Sequence[int], inference: InferenceConfig, device: torch.device):
        self.method, self.sequences, self.inference, self.device = method, tuple(sequences), inference, device
        self.window = tuple(inference.window or crop)
        self.intensity = Intensity(method.intensity)
        self.seconds: dict[str, list[float]] = {}  # by network, of each whole-volume prediction

    def volume(self, image: NDArray, brain: NDArray, meta: SubjectMeta) -> Volume:
        """The case of stored image (M, X, Y, Z), z-scored, and brain (X, Y, Z)."""
        short = [max(need - size, 0) for need, size in zip(self.window, brain.shape, strict=True)]
        pads = [(missing // 2, missing - missing // 2) for missing in short]
        # padded before the intensity map, which gives background its value: the same as in training crops
        padded = np.pad(image, [(0, 0), *pads])
        normalised = self.intensity.apply(padded.astype(np.float32), np.pad(brain, pads), meta, self.sequences)
        inner = tuple(slice(before, before + size) for (before, _), size in zip(pads, brain.shape, strict=True))
        return Volume(
            torch.from_numpy(normalised)[None].to(self.device), tuple(name in meta.sequences for name in self.sequences), inner
        )

    def labels(self, network: str, volume: Volume, subset: Subset) -> NDArray[np.uint8]:
        """Label map (X, Y, Z) that `network` gives when only `subset` is visible; call it in `evaluation_mode`."""
        return self._decide(self._logits(network, volume, subset))

    def logits(self, network: str, volume: Volume, subset: Subset) -> NDArray[np.float32]:
        """What `labels` decides on: (K, X, Y, Z)."""
        return self._logits(network, volume, subset)[0].cpu().numpy()

    def decide(self, logits: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Label map (X, Y, Z) of logits (K, X, Y, Z), which may have been resampled."""
        return self._decide(torch.from_numpy(logits)[None])

    def _logits(self, network: str, volume: Volume, subset: Subset) -> Tensor:
        available = torch.tensor([subset], device=self.device)
        # where, not multiplication: NaN in a hidden voxel must not reach the network
        visible = torch.where(available[:, :, None, None, None], volume.image, self.intensity.hidden_value)
        began = time.perf_counter()
        logits = predict_logits(self.method, network, visible, available, self.window, self.inference)[..., *volume.inner]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.setdefault(network, []).append(time.perf_counter() - began)
        return logits

    def _decide(self, logits: Tensor) -> NDArray[np.uint8]:
        return self.method.to_labels(logits)[0].to("cpu", torch.uint8).numpy()
