"""Whole-volume prediction by sliding window; what several networks, or one on mirrored windows, say of a voxel is averaged.

Such averages are of probabilities (of softmax or sigmoid, as the method's channels are meant), not of logits: a network that is very
sure then counts as one vote, and the mean is a probability itself (Lakshminarayanan et al., NeurIPS 2017). They are turned back
into logits, from which every method decides labels as ever.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor

from mstkd.batch import hide
from mstkd.config import InferenceConfig
from mstkd.data.intensity import Intensity
from mstkd.data.sample import Sample
from mstkd.errors import UserError
from mstkd.evaluate.postprocess import clear_components, postprocess
from mstkd.methods import Method
from mstkd.precision import autocast
from mstkd.shards.geometry import ras_spacing_mm, restore, restore_scores
from mstkd.shards.spec import LabelScheme, SubjectMeta
from mstkd.subsets import Subset

EPSILON = 1e-6  # probabilities stay so far from 0 and 1 when they become logits again


@contextmanager
def evaluation_mode(*methods: Method) -> Iterator[None]:
    """Every network in eval mode and without gradient inside; each module's mode as it was afterwards."""
    training = {module: module.training for method in methods for network in method.networks.values() for module in network.modules()}
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def probabilities_of(method: Method, logits: Tensor) -> Tensor:
    """What logits (B, K, ...) say of each channel, 0 to 1."""
    return logits.softmax(1) if method.exclusive else logits.sigmoid()


def logits_of(method: Method, probabilities: Tensor) -> Tensor:
    """Logits (B, K, ...) that say so."""
    return probabilities.clamp_min(EPSILON).log() if method.exclusive else probabilities.logit(eps=EPSILON)


def mirrorings(axes: str | bool) -> list[tuple[int, ...]]:
    """The dimensions of (B, C, X, Y, Z) to be flipped, view by view, the first none: for "xy" (), X, Y, X and Y."""
    named = ["xyz".index(axis) + 2 for axis in axes or ""]
    return [flips for count in range(len(named) + 1) for flips in combinations(named, count)]


def predict_logits(
    method: Method, network: str, image: Tensor, available: Tensor, window: Sequence[int], inference: InferenceConfig
) -> Tensor:
    """Logits (1, K, X, Y, Z), or what a painter predicts, of `network` for image (1, M, X, Y, Z), hidden sequences filled, and available (1, M) bool.

    Logits of windows, or their sigmoids, are averaged with Gaussian or equal weights (`inference.average`, `.blend`), and before
    that the probabilities of a window's mirrored views (`.mirror`), of painters the images. Each axis of the image must be at
    least as long as the window's. Nothing is masked: a label outside the brain stays.
    """
    painter = network in method.painters
    probable, views = inference.average == "probabilities" and not painter, mirrorings(inference.mirror)

    def predicted(patch: Tensor) -> Tensor:
        with autocast(patch.device, inference.precision):
            return method.predict(patch, available.expand(len(patch), -1), network).float()

    def mirrored(patch: Tensor) -> Tensor:
        total = 0.0
        for flips in views:
            seen = predicted(patch.flip(flips)).flip(flips)
            total = total + (seen if painter else probabilities_of(method, seen))
        return total / len(views) if painter else logits_of(method, total / len(views))

    def scores(patch: Tensor) -> Tensor:
        logits = mirrored(patch) if len(views) > 1 else predicted(patch)
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
    """A method's networks applied to whole volumes: normalisation, padding, window, hidden sequences; alone or as an ensemble."""

    def __init__(
        self, method: Method, sequences: Sequence[str], crop: Sequence[int], inference: InferenceConfig, device: torch.device,
        scheme: LabelScheme | None = None, others: Sequence[Method] = (),
    ):  # fmt: skip
        """`scheme`: of the method's label maps. `others`: methods like it with other weights, which take part in every prediction.

        Raises UserError where `inference.postprocess` or what else it says of label maps does not fit the scheme or the sequences.
        """
        self.method, self.sequences, self.inference, self.device = method, tuple(sequences), inference, device
        self.scheme, self.members = scheme, (method, *others)
        self.window = tuple(inference.window or crop)
        self.intensity = Intensity(method.intensity)
        self.seconds: dict[str, list[float]] = {}  # by network, of each whole-volume prediction
        if inference.postprocess != "none" and (scheme is None or not {"WT", "TC", "ET"} <= scheme.regions.keys()):
            raise UserError(f"inference.postprocess {inference.postprocess}: is for label maps of tumours (WT, TC, ET); set it to none")
        if "cluster" in inference.postprocess and "t1ce" not in self.sequences:
            raise UserError(f"inference.postprocess {inference.postprocess}: needs a sequence t1ce; the data has {', '.join(self.sequences)}; use cc+et")
        self._check_labels()

    def _check_labels(self) -> None:
        inference, regions = self.inference, self.scheme.regions if self.scheme else {}
        for key, named in (("largest_component", inference.largest_component), ("min_volume_ml", inference.min_volume_ml)):
            if unknown := [region for region in named if region not in regions]:
                raise UserError(f"inference.{key}: no region {unknown[0]}; there are {', '.join(regions) or 'none'}")
        if self.scheme and self.scheme.sided and "x" in (inference.mirror or ""):
            raise UserError(f"inference.mirror {inference.mirror}: label scheme {self.scheme.name} tells left from right, which x would mix; leave x out")

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
    def methods(self) -> tuple[Method, ...]:
        """All whose networks are run: what `evaluation_mode` is to be given."""
        return self.members

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

    def file_labels(self, scores: Tensor, volume: Volume, subset: Subset) -> NDArray[np.uint8]:
        """As `decide`, on the grid and in the orientation of the case's file; for resampled cases decided there, from interpolated logits."""
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

    def file_probabilities(self, scores: Tensor, volume: Volume, subset: Subset) -> dict[str, NDArray[np.float32]]:
        """As `probabilities`, on the grid and in the axes of the case's file, 0 outside the box; of resampled cases from interpolated logits."""
        meta = volume.meta
        if meta.grid_shape is None:
            return {region: restore(found, meta) for region, found in self.probabilities(scores, subset).items()}
        logits, _ = self._parted(scores, subset)
        interpolated = logits.cpu().numpy()

        def of(region: str, finer: NDArray) -> NDArray:
            return self.method.probabilities(torch.from_numpy(finer)[None])[region][0].numpy()

        return {region: restore_scores(interpolated, meta, partial(of, region)).astype(np.float32) for region in self.scheme.regions}

    def scores(self, network: str, volume: Volume, subset: Subset) -> Tensor:
        """What labels are decided on: logits (K, X, Y, Z) and, where the post-processing looks at it, T1ce behind them."""
        available = torch.tensor([subset], device=self.device)
        visible = volume.image if all(subset) else hide(volume.image, available, self.intensity.hidden_value)
        began = time.perf_counter()
        scores = self._logits(network, visible, available)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.setdefault(network, []).append(time.perf_counter() - began)
        if self._clusters(subset):
            scores = torch.cat([scores, visible[:, [self.sequences.index("t1ce")]]], 1)
        return scores[0, ..., *volume.inner]

    def _decide(self, scores: Tensor, subset: Subset, meta: SubjectMeta, spacing_mm: Sequence[float]) -> NDArray[np.uint8]:
        """Label map (X, Y, Z) of `scores` over the case's box, which may have been resampled to `spacing_mm`."""
        inference, (logits, t1ce) = self.inference, self._parted(scores, subset)
        labels = self.method.to_labels(logits[None])[0].to("cpu", torch.uint8).numpy()
        if inference.postprocess != "none":
            bottom_mm = meta.crop_box[2][0] * meta.spacing_mm[2]
            labels = postprocess(labels, self.scheme, spacing_mm, bottom_mm, t1ce)
        if inference.largest_component or inference.min_volume_ml:
            labels = clear_components(labels, self.scheme, spacing_mm, inference.min_volume_ml, inference.largest_component)
        return labels

    def _logits(self, network: str, visible: Tensor, available: Tensor) -> Tensor:
        """(1, K, X', Y', Z') of the network, or of the ensemble's mean probability."""
        predicted = (predict_logits(method, network, visible, available, self.window, self.inference) for method in self.members)
        if len(self.members) == 1:
            return next(predicted)
        total = probabilities_of(self.method, next(predicted))
        for logits in predicted:
            total += probabilities_of(self.method, logits)
        return logits_of(self.method, total / len(self.members))

    def _parted(self, scores: Tensor, subset: Subset) -> tuple[Tensor, NDArray | None]:
        """Logits, and T1ce where it is there."""
        return (scores[:-1], scores[-1].cpu().numpy()) if self._clusters(subset) else (scores, None)

    def _clusters(self, subset: Subset) -> bool:
        return "cluster" in self.inference.postprocess and subset[self.sequences.index("t1ce")]
