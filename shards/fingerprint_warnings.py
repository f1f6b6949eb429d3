"""What a person should look at before training on a shard set, found in its subjects' facts."""

from collections.abc import Iterator

import numpy as np

from mstkd.shards.facts import SubjectFacts
from mstkd.shards.geometry import strongly_anisotropic
from mstkd.shards.spec import ShardIndex

CLIPPED_SHARE = {"0.1-99.9": 0.01, "0.5-99.5": 0.02}  # of labelled voxels; of any brain voxels a range clips 0.002 and 0.01
SPACING_RATIO = 1.2  # largest over smallest along one axis in the set
RARE_SHARE = 0.5  # of subjects
FULL_SHARE = 0.95  # of the volume: a brain that fills it is none
SMALL_REGION_ML = 0.05
EXTREME_Z = 30.0
NAMED = 3  # subjects in one warning


def find_warnings(facts: list[SubjectFacts], index: ShardIndex) -> Iterator[str]:
    """One line each, in a fixed order; `facts` sorted by subject."""
    yield from _geometry(facts)
    yield from _brains(facts)
    for name in index.sequences:
        yield from _sequence(name, facts)
    yield from _labels(facts, index)


def _geometry(facts: list[SubjectFacts]) -> Iterator[str]:
    spacings = np.array([fact.stored_spacing_mm for fact in facts])
    for axis, low, high in zip("XYZ", spacings.min(axis=0), spacings.max(axis=0)):
        if high > SPACING_RATIO * low * (1 + 1e-6):
            yield f"spacing along {axis} differs in the set, {low:.3g} to {high:.3g} mm; set preprocessing.spacing_mm"
    if thick := [fact.subject for fact in facts if strongly_anisotropic(fact.stored_spacing_mm)]:
        yield f"strongly anisotropic voxels (ratio over 3) in {_who(thick)}; choose crop and network for thick slices"
    if unsure := [fact.subject for fact in facts if fact.by_convention]:
        yield f"the header does not say where left is in {_who(unsure)}; nibabel's convention was used, check one by eye"
    usual = sorted({fact.grid_from for fact in facts if fact.grid_from})
    if len(usual) > 1:
        common = max(usual, key=lambda name: (sum(fact.grid_from == name for fact in facts), name))
        others = [fact.subject for fact in facts if fact.grid_from not in (None, common)]
        yield f"most subjects lie on the grid of {common}, but not {_who(others)}, which lack it"


def _brains(facts: list[SubjectFacts]) -> Iterator[str]:
    if full := [fact.subject for fact in facts if fact.brain_from == "volumes" and fact.brain_share > FULL_SHARE]:
        yield f"the brain fills the volume in {_who(full)}; skull-strip first, or set brain_mask or preprocessing.background"
    if outside := [fact.subject for fact in facts if fact.labelled_in_brain < fact.labelled_voxels]:
        most = max(facts, key=lambda fact: fact.labelled_voxels - fact.labelled_in_brain)
        lost = most.labelled_voxels - most.labelled_in_brain
        yield f"labelled voxels lie outside the brain in {_who(outside)}, most in {most.subject} ({lost}); images are 0 there, check brain and label"


def _sequence(name: str, facts: list[SubjectFacts]) -> Iterator[str]:
    having = [fact for fact in facts if name in fact.sequences]
    if len(having) < RARE_SHARE * len(facts):
        yield f"{name}: only {len(having)} of {len(facts)} subjects have it"
    if constant := [fact.subject for fact in facts if name in fact.constant]:
        yield f"{name}: carries one value throughout in {_who(constant)}; counted as missing"
    extreme = [fact.subject for fact in having if max(-fact.sequences[name].z_min, fact.sequences[name].z_max) > EXTREME_Z]
    if extreme:
        yield f"{name}: voxels more than {EXTREME_Z:g} standard deviations from the mean in {_who(extreme)}; look for spikes"
    labelled = [fact for fact in having if fact.labelled_in_brain]
    total = sum(fact.labelled_in_brain for fact in labelled)
    for limits, allowed in CLIPPED_SHARE.items():
        clipped = sum(fact.sequences[name].clipped[limits] for fact in labelled)
        if clipped > allowed * total:
            yield f"{name}: the percentile range {limits} clips {100 * clipped / total:.1f} % of the labelled voxels; use a wider one"


def _labels(facts: list[SubjectFacts], index: ShardIndex) -> Iterator[str]:
    volumes = {subject: entry.label_volume_ml for subject, entry in sorted(index.subjects().items()) if entry.label_volume_ml}
    if unlabelled := sorted(set(index.subjects()) - set(volumes)) if index.scheme else []:
        yield f"no label in {_who(unlabelled)}"
    for region in index.scheme.regions if index.scheme else ():
        if volumes and not any(volume[region] for volume in volumes.values()):
            yield f"{region}: no subject has it; check the label scheme"
        if tiny := [subject for subject, volume in volumes.items() if 0 < volume[region] < SMALL_REGION_ML]:
            yield f"{region}: under {SMALL_REGION_ML:g} ml in {_who(tiny)}; a few voxels decide their scores"


def _who(subjects: list[str]) -> str:
    shown = ", ".join(subjects[:NAMED])
    return f"{len(subjects)} subjects ({shown}{', ...' if len(subjects) > NAMED else ''})" if len(subjects) > 1 else f"subject {shown}"
