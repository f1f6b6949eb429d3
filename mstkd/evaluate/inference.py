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
from mstkd.data.sample import Sample
from mstkd.errors import UserError
from mstkd.evaluate.postprocess import postprocess
from mstkd.methods import Method
from mstkd.shards.geometry import ras_spacing_mm, restore, restore_scores
from mstkd.shards.spec import LabelScheme, SubjectMeta
from mstkd.subsets import Subset


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
EPSILON = 1e-6  # probabilities stay so far from 0 and 1 when they become logits again


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
    """Logits (1, K, X, Y, Z), or what a painter predicts, of `network` for image (1, M, X, Y, Z), hidden sequences filled, and available (1, M) bool.

    Logits of windows, or their sigmoids, are averaged with Gaussian or equal weights (`inference.average`, `.blend`). Each
    axis of the image must be at least as long as the window's. Nothing is masked: a label outside the brain stays.
    """
    probable = inference.average == "probabilities" and network not in method.painters

    def scores(patch: Tensor) -> Tensor:
        with torch.autocast(patch.device.type, AUTOCAST.get(inference.precision), enabled=inference.precision in AUTOCAST):
            logits = method.predict(patch, available.expand(len(patch), -1), network).float()
        return logits.sigmoid() if probable else logits

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence")  # MONAI's, about its own indexing
        mode = {"gaussian": "gaussian", "uniform": "constant"}[inference.blend]
        blended = sliding_window_inference(image, tuple(window), inference.batch, scores, overlap=inference.overlap, mode=mode)
    return blended.logit(eps=EPSILON) if probable else blended


@dataclass(frozen=True)
class Volume:
    """A whole normalised case, padded to the window where it is smaller."""

    image: Tensor  # (1, M, X', Y', Z') float32
    present: Subset
    inner: tuple[slice, slice, slice]  # where the stored volume (X, Y, Z) lies in it
    meta: SubjectMeta


@dataclass(frozen=True)
class Case:
    """A stored case as networks are shown it: of the sequences that it has those of a subset."""

    volume: Volume

    @property
    def present(self) -> Subset:
        return self.volume.present

    def given(self, subset: Subset) -> tuple[Volume, Subset]:
        """What a network sees when `subset` is given, and which sequences of that are visible."""
        return self.volume, subset


class Predictor:
    """A method's networks applied to whole volumes: normalisation, padding, window, hidden sequences."""

    def __init__(
        self, method: Method, sequences: Sequence[str], crop: Sequence[int], inference: InferenceConfig, device: torch.device,
        scheme: LabelScheme | None = None,
    ):  # fmt: skip
        """`scheme`: of the method's label maps. Raises UserError where `inference.postprocess` does not fit it or the sequences."""
        self.method, self.sequences, self.inference, self.device = method, tuple(sequences), inference, device
        self.scheme = scheme
        self.window = tuple(inference.window or crop)
        self.intensity = Intensity(method.intensity)
        self.seconds: dict[str, list[float]] = {}  # by network, of each whole-volume prediction
        if inference.postprocess != "none" and (scheme is None or not {"WT", "TC", "ET"} <= scheme.regions.keys()):
            raise UserError(f"inference.postprocess {inference.postprocess}: is for label maps of tumours (WT, TC, ET); set it to none")
        if "cluster" in inference.postprocess and "t1ce" not in self.sequences:
            raise UserError(f"inference.postprocess {inference.postprocess}: needs a sequence t1ce; the data has {', '.join(self.sequences)}; use cc+et")

    def volume(self, image: NDArray, brain: NDArray, meta: SubjectMeta) -> Volume:
        """The case of stored image (M, X, Y, Z), z-scored, and brain (X, Y, Z)."""
        short = [max(need - size, 0) for need, size in zip(self.window, brain.shape, strict=True)]
        pads = [(missing // 2, missing - missing // 2) for missing in short]
        image = self.intensity.prepared(image, brain, meta, self.sequences)
        # padded before the intensity map, which gives background its value: the same as in training crops
        padded = np.pad(image, [(0, 0), *pads])
        normalised = self.intensity.apply(padded.astype(np.float32), np.pad(brain, pads), meta, self.sequences)
        inner = tuple(slice(before, before + size) for (before, _), size in zip(pads, brain.shape, strict=True))
        return Volume(
            torch.from_numpy(normalised)[None].to(self.device), tuple(name in meta.sequences for name in self.sequences), inner, meta
        )

    @property
    def clocks(self) -> list[dict[str, list[float]]]:
        """What predictions have taken so far, by network."""
        return [self.seconds]

    @property
    def takes(self) -> tuple[str, ...] | None:
        """The subsets that may be given, by name; None: all."""
        return self.method.subsets

    def case(self, sample: Sample) -> Case:
        """A stored case, to be shown to networks subset by subset."""
        return Case(self.volume(sample.image, sample.brain, sample.meta))

    def labels(self, network: str, volume: Volume, subset: Subset) -> NDArray[np.uint8]:
        """Label map (X, Y, Z) on the stored grid that `network` gives when only `subset` is visible; call it in `evaluation_mode`."""
        return self.decide(self.scores(network, volume, subset), volume, subset)

    def file_labels(self, network: str, volume: Volume, subset: Subset) -> NDArray[np.uint8]:
        """As `labels`, on the grid and in the orientation of the case's file; for resampled cases decided there, from interpolated logits."""
        scores = self.scores(network, volume, subset)
        if volume.meta.grid_shape is None:
            return restore(self.decide(scores, volume, subset), volume.meta)
        return self.decide(scores, volume, subset, on_file=True)

    def decide(self, scores: Tensor, volume: Volume, subset: Subset, on_file: bool = False) -> NDArray[np.uint8]:
        """Label map (X, Y, Z) of `scores` on the stored grid, or of a resampled case on the grid and in the orientation of its file."""
        meta = volume.meta
        if not on_file:
            return self._decide(scores, subset, meta, meta.spacing_mm)
        spacing_mm = ras_spacing_mm(np.asarray(meta.original_affine))
        return restore_scores(scores.cpu().numpy(), meta, lambda finer: self._decide(torch.from_numpy(finer), subset, meta, spacing_mm))

    def probabilities(self, scores: Tensor, subset: Subset) -> dict[str, NDArray[np.float32]]:
        """By region (X, Y, Z) on the stored grid, of those that the method tells; nothing is cleared up."""
        logits, _ = self._parted(scores, subset)
        return {region: found[0].cpu().numpy() for region, found in self.method.probabilities(logits[None]).items()}

    def scores(self, network: str, volume: Volume, subset: Subset) -> Tensor:
        """What labels are decided on: logits (K, X, Y, Z) and, where the post-processing looks at it, T1ce behind them."""
        available = torch.tensor([subset], device=self.device)
        # where, not multiplication: NaN in a hidden voxel must not reach the network
        visible = torch.where(available[:, :, None, None, None], volume.image, self.intensity.hidden_value)
        began = time.perf_counter()
        scores = predict_logits(self.method, network, visible, available, self.window, self.inference)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.setdefault(network, []).append(time.perf_counter() - began)
        if self._clusters(subset):
            scores = torch.cat([scores, visible[:, [self.sequences.index("t1ce")]]], 1)
        return scores[0, ..., *volume.inner]

    def _decide(self, scores: Tensor, subset: Subset, meta: SubjectMeta, spacing_mm: Sequence[float]) -> NDArray[np.uint8]:
        """Label map (X, Y, Z) of `scores` over the case's box, which may have been resampled to `spacing_mm`."""
        logits, t1ce = self._parted(scores, subset)
        labels = self.method.to_labels(logits[None])[0].to("cpu", torch.uint8).numpy()
        if self.inference.postprocess == "none":
            return labels
        bottom_mm = meta.crop_box[2][0] * meta.spacing_mm[2]
        return postprocess(labels, self.scheme, spacing_mm, bottom_mm, t1ce)

    def _parted(self, scores: Tensor, subset: Subset) -> tuple[Tensor, NDArray | None]:
        """Logits, and T1ce where it is there."""
        return (scores[:-1], scores[-1].cpu().numpy()) if self._clusters(subset) else (scores, None)

    def _clusters(self, subset: Subset) -> bool:
        return "cluster" in self.inference.postprocess and subset[self.sequences.index("t1ce")]
