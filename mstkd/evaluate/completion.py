"""Missing sequences of whole cases, completed slice by slice.

Letters: K axial slices, M sequences (in the data set's order), S pixels per axis of a slice, X Y Z voxels (RAS+).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mstkd.batch import hide
from mstkd.config import InferenceConfig, SliceConfig
from mstkd.data.intensity import Intensity
from mstkd.data.planes import Plane
from mstkd.data.sample import Sample, rng
from mstkd.errors import UserError
from mstkd.methods import Method
from mstkd.precision import autocast
from mstkd.shards.intensity_statistics import statistics
from mstkd.shards.spec import SubjectMeta
from mstkd.subsets import Subset, subset_name


@dataclass(frozen=True)
class Slices:
    """Axial slices of a case as networks see them."""

    image: Tensor  # (K, M, S, S) float32 in the method's intensities
    brain: Tensor  # (K, S, S) bool
    label: Tensor | None  # (K, S, S) uint8 in the data's label scheme
    position: tuple[int, ...]  # of each slice in the stored volume: k of [..., k]
    present: Subset
    plane: Plane
    meta: SubjectMeta

    def part(self, first: int, last: int) -> "Slices":
        """Slices `first` to `last` - 1 of these."""
        chosen = slice(first, last)
        label = None if self.label is None else self.label[chosen]
        return replace(self, image=self.image[chosen], brain=self.brain[chosen], label=label, position=self.position[chosen])


class Completer:
    """A synthesis method's networks applied to whole cases: which slices, normalisation, size, hidden sequences, and the way back."""

    def __init__(self, method: Method, sequences: Sequence[str], slices: SliceConfig, inference: InferenceConfig, device: torch.device):
        """Raises UserError where the method's intensities have no ends to measure images between."""
        self.method, self.sequences, self.config, self.inference, self.device = method, tuple(sequences), slices, inference, device
        self.intensity = Intensity(method.intensity)
        self.seconds: dict[str, list[float]] = {}  # by network, of each case completed from one subset
        self.slices_done: dict[str, list[int]] = {}  # and how many slices those were
        if method.intensity.kind == "zscore":
            raise UserError("method.intensity: z-scores have no smallest and largest value, and completed images are measured between them; use minmax or percentile")

    @property
    def clocks(self) -> list[dict[str, list[float]]]:
        """What completions have taken so far, by network, and of how many slices."""
        return [self.seconds, self.slices_done]

    def slices(self, sample: Sample, min_brain: float | None = None) -> Slices:
        """Those slices of a stored case whose share of brain is at least `min_brain`, by default `data.slices.min_brain`.

        The share is that of the padded square, counted in stored voxels. Raises UserError if there is no such slice.
        """
        meta, plane = sample.meta, Plane.of(sample.meta, self.config.size, self.config.fit)
        floor = self.config.min_brain if min_brain is None else min_brain
        kept = np.flatnonzero(np.count_nonzero(sample.brain, axis=(0, 1)) >= floor * plane.side**2)
        if not len(kept):
            raise UserError(f"subject {meta.subject}: no axial slice of it is {100 * floor:g} % brain; lower data.slices.min_brain")
        normalised = self._normalised(sample)[..., kept]
        return Slices(
            image=plane.bring(torch.from_numpy(normalised).permute(3, 0, 1, 2), self.intensity.hidden_value),
            brain=_brought_labels(plane, sample.brain > 0, kept),
            label=None if sample.label is None else _brought_labels(plane, sample.label, kept),
            position=tuple(kept.tolist()),
            present=tuple(name in meta.sequences for name in self.sequences),
            plane=plane,
            meta=meta,
        )

    def complete(self, network: str, case: Slices, subset: Subset) -> Tensor:
        """The stack (K, M, S, S) float32 in [0, 1], on the CPU, that `network` makes of `case` when only `subset` is visible.

        Call it in `evaluation_mode`. Raises UserError if the network is an oracle and the case has no label.
        """
        if network in self.method.oracles and case.label is None:
            raise UserError(f"subject {case.meta.subject} has no label, and {network} is given the labels of its cases; leave it out with evaluate.networks")
        began, count = time.perf_counter(), len(case.position)
        parts = [case.part(first, first + self.inference.batch) for first in range(0, count, self.inference.batch)]
        completed = torch.cat([self.unit(self._predict(network, part, subset)).cpu() for part in parts])
        self.seconds.setdefault(network, []).append(time.perf_counter() - began)
        self.slices_done.setdefault(network, []).append(count)
        return completed

    def fused(self, network: str, part: Slices, subset: Subset) -> Tensor:
        """The features (K, N, C, s, s) that `network` fuses on the way to each of the N sequences outside `subset`; see `Method.fused`."""
        visible, available = self._visible(part, subset)
        with autocast(self.device, self.inference.precision):
            return self.method.fused(visible, available, part.label.to(self.device), network).float()

    def volume(self, network: str, sample: Sample, subset: Subset) -> NDArray[np.float32]:
        """A stored case completed from `subset`, on its stored grid: (M, X, Y, Z) in [0, 1], 0 outside the brain.

        Every slice is completed. What is given stands in it as it was stored, normalised. Call it in `evaluation_mode`.
        """
        case = self.slices(sample, min_brain=0)
        made = case.plane.back(self.complete(network, case, subset)).permute(1, 2, 3, 0)
        given = self.unit(torch.from_numpy(self._normalised(sample)))
        stack = torch.where(torch.tensor(subset)[:, None, None, None], given, made)
        return torch.where(torch.from_numpy(sample.brain > 0), stack, 0.0).numpy()

    def sample(self, network: str, sample: Sample, subset: Subset, kept: Subset | None = None) -> Sample:
        """A stored case completed from `subset`, as it would be stored: every sequence there, those not `kept` (default: `subset`) synthetic.

        What is kept stays bit by bit; what is made is z-scored over the brain, its raw scale that of the network, 0 to 1. Call it in
        `evaluation_mode`. Raises UserError if the network makes a constant image.
        """
        kept = kept or subset
        volumes = None if all(kept) else self.volume(network, sample, subset)
        image, stats, inside = np.zeros_like(sample.image), {}, sample.brain > 0
        for channel, name in enumerate(self.sequences):
            if kept[channel]:
                image[channel], stats[name] = sample.image[channel], sample.meta.stats[name]
                continue
            voxels = np.ascontiguousarray(volumes[channel][inside], dtype=np.float32)
            stats[name], _ = statistics(voxels)
            if stats[name].std == 0:
                raise UserError(f"{sample.meta.subject}: {network} made a constant {name}; train the synthesis run further")
            image[channel][inside] = ((voxels - stats[name].mean) / stats[name].std).astype(np.float16)
        made = tuple(name for name, there in zip(self.sequences, kept, strict=True) if not there)
        meta = sample.meta.model_copy(update={"sequences": self.sequences, "stats": stats, "synthetic": made, "constant": ()})
        return Sample(image, sample.brain, sample.label, meta)

    def unit(self, image: Tensor) -> Tensor:
        """Images in the method's intensities, of any shape, mapped to [0, 1] and clipped."""
        low, high = self.intensity.config.interval
        return ((image - low) / (high - low)).clamp(0, 1)

    def _normalised(self, sample: Sample) -> NDArray[np.float32]:
        image = self.intensity.prepared(sample.image, sample.brain, sample.meta, self.sequences)
        return self.intensity.apply(image.astype(np.float32), sample.brain, sample.meta, self.sequences)

    def _predict(self, network: str, part: Slices, subset: Subset) -> Tensor:
        visible, available = self._visible(part, subset)
        with self._draws(part, subset), autocast(self.device, self.inference.precision):
            if network in self.method.oracles:
                return self.method.predict_oracle(visible, available, part.label.to(self.device), network).float()
            return self.method.predict(visible, available, network).float()

    def _visible(self, part: Slices, subset: Subset) -> tuple[Tensor, Tensor]:
        """What a network is shown, (K, M, S, S), and which of it is there, (K, M)."""
        available = torch.tensor([subset], device=self.device)
        visible = hide(part.image.to(self.device), available, self.intensity.hidden_value)
        return visible, available.expand(len(visible), -1)

    @contextmanager
    def _draws(self, part: Slices, subset: Subset) -> Iterator[None]:
        """What a sampler draws inside belongs to case, subset and first slice: the same on any rank, and training's own draws go on as they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(rng("completion", part.meta.subject, subset_name(self.sequences, subset), part.position[0]).integers(2**63)))
            yield


def _brought_labels(plane: Plane, volume: NDArray, kept: NDArray[np.intp]) -> Tensor:
    """Slices `kept` of a mask or label map (X, Y, Z) as (K, S, S)."""
    return plane.bring_labels(torch.from_numpy(np.ascontiguousarray(volume[..., kept])).permute(2, 0, 1))
