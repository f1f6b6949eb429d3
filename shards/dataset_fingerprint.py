"""`fingerprint.json`: what a shard set holds, in figures and as a text with warnings.

Made from the subjects' facts and the index alone, so it does not depend on the order in which workers finish.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mstkd.files import write_json
from mstkd.shards.facts import RANGES, SequenceFacts, SubjectFacts
from mstkd.shards.fingerprint_warnings import find_warnings
from mstkd.shards.layout import FINGERPRINT
from mstkd.shards.spec import ShardIndex, Strict

INTENSITIES = ("mean", "std", "min", "p0_1", "p0_5", "median", "p99_5", "p99_9", "max")


class Spread(Strict):
    """One figure over subjects."""

    min: float
    median: float
    max: float


class PerAxis(Strict):
    """A figure along X, Y, Z over subjects."""

    min: tuple[float, float, float]
    median: tuple[float, float, float]
    max: tuple[float, float, float]


class Clipped(Strict):
    """Share (0 to 1) of the brain's labelled voxels that a percentile range clips."""

    pooled: float  # over all subjects' voxels
    worst: float  # in one subject


class SequenceSummary(Strict):
    subjects: int
    share: float  # of the subjects, 0 to 1
    constant: int  # further ones whose scan carries one value
    intensity: dict[str, Spread]  # raw, over the brain, per figure of INTENSITIES
    z_score: Spread | None  # smallest, median and largest of the subjects' largest |z|
    clipped: dict[str, Clipped]  # per percentile range


class RegionSummary(Strict):
    """Volume of a region over the subjects that have it."""

    volume_ml: Spread | None
    subjects: int
    absent: int  # labelled subjects without it


class Fingerprint(Strict):
    """`fingerprint.json`. Axes are X, Y, Z of RAS+."""

    version: Literal[1] = 1
    dataset: str
    subjects: int
    patients: int
    labelled: int
    file_shape: PerAxis
    file_spacing_mm: PerAxis
    stored_shape: PerAxis
    stored_spacing_mm: PerAxis
    orientations: dict[str, int]  # axis codes of the files -> subjects
    orientation_by_convention: int  # subjects whose header does not say where left is
    brain_from: dict[str, int]
    sites: dict[str, int]
    field_strengths_t: dict[str, int]
    sequences: dict[str, SequenceSummary]
    subsets: dict[str, int]  # sequences joined by + -> subjects
    regions: dict[str, RegionSummary]
    warnings: tuple[str, ...]


def write_fingerprint(folder: Path, facts: Sequence[SubjectFacts], index: ShardIndex) -> str:
    """Write <folder>/fingerprint.json from the facts of the index's subjects, in any order; its text comes back."""
    fingerprint = summarise(facts, index)
    write_json(Path(folder) / FINGERPRINT, fingerprint.model_dump(mode="json"))
    return as_text(fingerprint)


def summarise(facts: Sequence[SubjectFacts], index: ShardIndex) -> Fingerprint:
    """The fingerprint of a set. `facts` holds one entry per subject of the index, in any order."""
    entries = index.subjects()
    ordered = sorted(facts, key=lambda fact: fact.subject)
    if [fact.subject for fact in ordered] != sorted(entries):
        raise ValueError("facts and index are not about the same subjects")
    return Fingerprint(
        dataset=index.dataset,
        subjects=len(ordered),
        patients=len({entry.patient for entry in entries.values()}),
        labelled=sum(bool(entry.label_volume_ml) for entry in entries.values()),
        file_shape=_per_axis(fact.file_shape for fact in ordered),
        file_spacing_mm=_per_axis(fact.file_spacing_mm for fact in ordered),
        stored_shape=_per_axis(fact.stored_shape for fact in ordered),
        stored_spacing_mm=_per_axis(fact.stored_spacing_mm for fact in ordered),
        orientations=_counts(fact.orientation for fact in ordered),
        orientation_by_convention=sum(fact.by_convention for fact in ordered),
        brain_from=_counts(fact.brain_from for fact in ordered),
        sites=_counts(fact.site for fact in ordered if fact.site is not None),
        field_strengths_t=_counts(f"{fact.field_strength_t:g}" for fact in ordered if fact.field_strength_t is not None),
        sequences={name: _sequence(name, ordered) for name in index.sequences},
        subsets=_counts("+".join(name for name in index.sequences if name in fact.sequences) for fact in ordered),
        regions=_regions(index),
        warnings=tuple(find_warnings(ordered, index)),
    )


def as_text(fingerprint: Fingerprint) -> str:
    """A plain-text summary, warnings last."""
    lines = [f"{fingerprint.dataset}: {fingerprint.subjects} subjects of {fingerprint.patients} patients, {fingerprint.labelled} with a label"]
    for name, axes in (("shape in the files", fingerprint.file_shape), ("shape stored", fingerprint.stored_shape)):
        lines.append(f"  {name}: {_axes(axes)} voxels")
    for name, axes in (("spacing in the files", fingerprint.file_spacing_mm), ("spacing stored", fingerprint.stored_spacing_mm)):
        lines.append(f"  {name}: {_axes(axes)} mm")
    lines.append(f"  orientation of the files: {_listed(fingerprint.orientations)}")
    if fingerprint.sites:
        lines.append(f"  sites: {_listed(fingerprint.sites)}")
    if fingerprint.field_strengths_t:
        lines.append(f"  field strengths (T): {_listed(fingerprint.field_strengths_t)}")
    lines.append(f"  sequences that subjects have: {_listed(fingerprint.subsets)}")
    for name, sequence in fingerprint.sequences.items():
        lines.append(f"  {name}: {_sequence_text(sequence)}")
    for name, region in fingerprint.regions.items():
        volume = region.volume_ml
        volumes = f"{volume.min:.3g} / {volume.median:.3g} / {volume.max:.3g} ml (min, median, max)" if volume else "nowhere"
        lines.append(f"  {name}: {volumes}; {region.absent} subjects without it")
    lines += [f"WARNING: {warning}" for warning in fingerprint.warnings] or ["no warnings"]
    return "\n".join(lines)


def _sequence(name: str, facts: list[SubjectFacts]) -> SequenceSummary:
    having = [fact for fact in facts if name in fact.sequences]
    own = [fact.sequences[name] for fact in having]
    labelled = [(fact.sequences[name], fact.labelled_in_brain) for fact in having if fact.labelled_in_brain]
    clipped = {}
    for limits in RANGES if labelled else ():
        counts = [sequence.clipped[limits] for sequence, _ in labelled]
        totals = [total for _, total in labelled]
        clipped[limits] = Clipped(pooled=sum(counts) / sum(totals), worst=max(count / total for count, total in zip(counts, totals)))
    return SequenceSummary(
        subjects=len(having),
        share=len(having) / len(facts),
        constant=sum(name in fact.constant for fact in facts),
        intensity={key: _spread([_figure(each, key) for each in own]) for key in INTENSITIES} if own else {},
        z_score=_spread([max(-each.z_min, each.z_max) for each in own]) if own else None,
        clipped=clipped,
    )


def _regions(index: ShardIndex) -> dict[str, RegionSummary]:
    labelled = [entry.label_volume_ml for entry in index.subjects().values() if entry.label_volume_ml]
    regions = {}
    for name in index.scheme.regions if index.scheme else ():
        volumes = sorted(volume[name] for volume in labelled if volume[name] > 0)
        regions[name] = RegionSummary(
            volume_ml=_spread(volumes) if volumes else None, subjects=len(volumes), absent=len(labelled) - len(volumes)
        )
    return regions


def _figure(sequence: SequenceFacts, key: str) -> float:
    return sequence.median if key == "median" else getattr(sequence.stats, key)


def _spread(values: list[float]) -> Spread:
    return Spread(min=min(values), median=float(np.median(values)), max=max(values))


def _per_axis(values: Iterable[tuple[float, ...]]) -> PerAxis:
    table = np.array(list(values), float)
    return PerAxis(min=table.min(axis=0).tolist(), median=np.median(table, axis=0).tolist(), max=table.max(axis=0).tolist())


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _axes(axes: PerAxis) -> str:
    if axes.min == axes.max:
        return " x ".join(f"{value:.4g}" for value in axes.median)
    return " x ".join(f"{low:.4g} to {high:.4g}" for low, high in zip(axes.min, axes.max))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _sequence_text(sequence: SequenceSummary) -> str:
    if not sequence.subjects:
        return "nobody has it"
    mean, low, high = (sequence.intensity[key] for key in ("mean", "p0_5", "p99_5"))
    text = f"{sequence.subjects} subjects ({100 * sequence.share:.0f} %); brain mean {mean.min:.4g} to {mean.max:.4g}"
    text += f", 0.5-99.5 percentile {low.median:.4g} to {high.median:.4g} (medians), largest |z| {sequence.z_score.max:.3g}"
    if sequence.clipped:
        shares = ", ".join(f"{100 * share.pooled:.2f} % by {name}" for name, share in sequence.clipped.items())
        text += f"; labelled voxels clipped: {shares}"
    return text
