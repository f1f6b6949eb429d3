"""What a reader must know of an evaluation besides its figures; it is said below the conventions."""

import logging
from collections.abc import Sequence

from mstkd.data.availability import Availability
from mstkd.evaluate.overlap import refuse, training_overlap
from mstkd.evaluate.source import CaseSource, split_subjects
from mstkd.subsets import Subset, subset_name
from mstkd.trained_run import TrainedRun

log = logging.getLogger(__name__)


def overlap_note(run: TrainedRun, source: CaseSource, split: str, allowed: bool) -> dict[str, str]:
    """Cases that training saw. Raises UserError unless `allowed`, or the recipe allows it."""
    found = training_overlap(run.source.stores, run.config.data.fold, source.stores, split)
    if not (allowed or run.config.data.allow_overlap):
        refuse(found.unstated, split, "--allow-overlap")
    if not found.pairs:
        return {}
    seen = {other for _, other, _ in found.pairs}
    return {"overlap": f"ALLOWED OVERLAP: {len(seen)} of these cases were seen in training; the figures are optimistic"}


def trained_subsets(run: TrainedRun, patterns: set[Subset]) -> set[Subset]:
    """What training could show of subjects that have the sequences in one of `patterns`."""
    method, sequences = run.method, run.facts.sequences
    if method.complete_only:
        patterns = {(True,) * len(sequences)}
    configs = [method.availability(stage) or run.config.data.availability for stage in run.config.stages or method.stages]
    return {subset for config in configs for subset in Availability(config, sequences).possible(patterns)}


def untrained_note(run: TrainedRun, subsets: Sequence[Subset]) -> dict[str, str]:
    """Subsets that are scored though training never showed them to the network."""
    sequences = run.facts.sequences
    entries = [store.subjects[key] for store in run.source.stores for key in split_subjects(store, "train", run.config.data.fold)]
    seen = trained_subsets(run, {tuple(name in entry.sequences for name in sequences) for entry in entries})
    never = [subset_name(sequences, subset) for subset in subsets if subset not in seen]
    if not never:
        return {}
    log.warning("%s was never trained on %s", run.config.name, ", ".join(never))
    return {"never trained": f"{', '.join(never)}: training never gave these; the figures show what happens then, not what training could reach"}
