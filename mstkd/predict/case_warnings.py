"""What a reader of a prediction must be warned of: the case is not like those of training.

A network that is shown something new answers anyway. Each warning is a line; what cannot be compared, because the run folder and its data
say nothing of training's cases, is named as unchecked.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mstkd.evaluate.notes import trained_subsets
from mstkd.run_folder import read_record
from mstkd.shards.fingerprint_warnings import FULL_SHARE, SPACING_RATIO
from mstkd.shards.preprocess import Preprocessed
from mstkd.subsets import Subset, parse_subset, subset_name
from mstkd.trained_run import TrainedRun
from mstkd.training_ranges import training_ranges

LARGEST_BRAIN_ML = 2200.0  # skull-stripped, CSF included; adults have 1,000 to 2,000
Z_RATIO = 1.5  # how far beyond training's range the farthest voxel may lie


class CaseWarnings:
    """How the cases of one run's training looked."""

    def __init__(self, run: TrainedRun, completed: bool = False):
        """`completed`: a synthesis run comes first, so that the network sees every sequence."""
        data = read_record(run.folder)["data"]
        self.sequences = run.facts.sequences
        self.ranges: dict[str, Any] | None = data.get("ranges") or training_ranges([shard_set.path for shard_set in run.config.data.shards])
        self.trained = None if completed else _trained(run, self.ranges)
        self.unchecked = [
            *(["spacing", "intensities"] if self.ranges is None else []),
            *(["subset"] if self.trained is None and not completed else []),
        ]

    def of(self, stored: Preprocessed, subset: Subset) -> Iterator[str]:
        """Warnings about a case of which `subset` was used."""
        if self.trained is not None and subset not in self.trained:
            yield f"subset {subset_name(self.sequences, subset)}: training never showed it to the network"
        facts, brain_ml = stored.facts, float(np.count_nonzero(stored.brain) * np.prod(stored.meta.spacing_mm)) / 1000
        if facts.brain_from == "volumes" and (facts.brain_share > FULL_SHARE or brain_ml > LARGEST_BRAIN_ML):
            yield f"skull probably not stripped: what is not background has {brain_ml:.0f} ml, {100 * facts.brain_share:.0f} % of the image"
        for name in stored.meta.constant:
            yield f"{name}: carries one value throughout and counts as missing"
        if facts.by_convention:
            yield "the header does not say where left is; the convention was used, check it by eye"
        if self.ranges is not None:
            yield from self._spacing(facts.file_spacing_mm)
            yield from self._intensities(stored)

    def _spacing(self, spacing_mm: Sequence[float]) -> Iterator[str]:
        low, high = self.ranges["spacing_mm"]
        if any(own * SPACING_RATIO < least or own > most * SPACING_RATIO for own, least, most in zip(spacing_mm, low, high, strict=True)):
            own = " x ".join(f"{value:.3g}" for value in spacing_mm)
            seen = " x ".join(f"{a:.3g}" if a == b else f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True))
            yield f"spacing {own} mm is far from training's {seen} mm"

    def _intensities(self, stored: Preprocessed) -> Iterator[str]:
        for name in stored.meta.sequences:
            low, high = self.ranges["z_score"].get(name, (0.0, np.inf))
            own = max(-stored.facts.sequences[name].z_min, stored.facts.sequences[name].z_max)
            if own > high * Z_RATIO or own * Z_RATIO < low:
                yield f"{name}: intensities out of training's range: the farthest voxel lies {own:.3g} standard deviations from the brain's mean, in training {low:.3g} to {high:.3g}"


def _trained(run: TrainedRun, ranges: dict[str, Any] | None) -> set[Subset] | None:
    """What training could show; None: not known, since it hid nothing and nobody noted what its subjects had."""
    whole = (True,) * len(run.facts.sequences)
    if ranges is not None:
        return trained_subsets(run, {parse_subset(name, run.facts.sequences) for name in ranges["subsets"]})
    configs = [run.method.availability(stage) or run.config.data.availability for stage in run.method.stages]
    if not run.method.complete_only and any(config.kind == "natural" for config in configs):
        return None
    return trained_subsets(run, {whole})
