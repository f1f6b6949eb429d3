"""Subjects that two sets of cases share: by patient, or by what the images hold (BraTS years, FeTS and MSD overlap).

Content is compared sequence by sequence, by name; two subjects without a common sequence by patient only. A copy that
was resampled, registered or skull-stripped anew is another image to this comparison.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mstkd.config import DataConfig
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.evaluate.source import split_subjects
from mstkd.shards.fingerprint import BLOCKS, SAME_SUBJECT_CORRELATION, decode
from mstkd.shards.spec import ShardIndex, SubjectEntry

log = logging.getLogger(__name__)

BLOCK_SUBJECTS = 512  # compared with as many at a time: two blocks take 17 MB, whatever the sets' size

Overlap = tuple[str, str, str]  # subject of a, subject of b, reason


@dataclass(frozen=True)
class TrainingOverlap:
    """What training shares with the cases it is judged on. `stated`: within a set whose splits.json allows it."""

    unstated: list[Overlap]
    stated: list[Overlap]

    @property
    def pairs(self) -> list[Overlap]:
        return self.unstated + self.stated


def find_overlap(index_a: ShardIndex, subjects_a: Sequence[str], index_b: ShardIndex, subjects_b: Sequence[str]) -> list[Overlap]:
    """(subject of a, subject of b, reason) for every pair that shares a patient or, in some sequence, an image."""
    entries_a, entries_b = index_a.subjects(), index_b.subjects()
    first, second = [entries_a[key] for key in subjects_a], [entries_b[key] for key in subjects_b]
    return [(first[i].subject, second[j].subject, reason) for i, j, reason in _shared(first, second)]


def training_overlap(
    training: Sequence[ShardStore], fold: int, stores: Sequence[ShardStore], split: str, judged_fold: int | None = None
) -> TrainingOverlap:
    """Pairs of a subject that training saw and one of `split`; for "test" and "all" model selection counts as training.

    `fold` of both, or of the training alone where `judged_fold` is given.
    """
    seen = [
        (store, store.subjects[key])
        for store in training
        for part in (("train",) if split == "val" else ("train", "val"))
        for key in split_subjects(store, part, fold)
    ]
    judged_fold = fold if judged_fold is None else judged_fold
    judged = [(store, store.subjects[key]) for store in stores for key in split_subjects(store, split, judged_fold)]
    found = TrainingOverlap([], [])
    for i, j, reason in _shared([entry for _, entry in seen], [entry for _, entry in judged]):
        (own, trained), (other, tested) = seen[i], judged[j]
        same_set = own.place == other.place
        pairs = found.stated if same_set and own.splits.allow_overlap else found.unstated
        pairs.append((trained.subject, tested.subject, reason if same_set else f"{reason}, in {own.folder} and in {other.folder}"))
    return found


def refuse_overlap(stores: Sequence[ShardStore], config: DataConfig) -> None:
    """Raise UserError if a fold's training subject is also a validation or test subject, within a set or across sets.

    `data.allow_overlap`, or `allow_overlap` in the splits.json of the one set that holds both, lets it pass; the log says so.
    """
    for split in ("val", "test"):
        found = training_overlap(stores, config.fold, stores, split)
        if not config.allow_overlap:
            refuse(found.unstated, split, "data.allow_overlap=true")
        if found.pairs:
            seen = {other for _, other, _ in found.pairs}
            log.warning("ALLOWED OVERLAP: %d subject(s) of the %s split are in training too, e.g. %s", len(seen), split, found.pairs[0][1])


def refuse(found: Sequence[Overlap], split: str, permission: str) -> None:
    """Raise UserError naming the first pair, if there is one, and the `permission` that lets it pass."""
    if found:
        trained, other, reason = found[0]
        pair = f"training subject {trained} and {split} subject {other}: {reason}"
        raise UserError(f"{pair} ({len(found)} such pairs); repair splits.json, or say {permission}")


def _shared(first: list[SubjectEntry], second: list[SubjectEntry]) -> list[tuple[int, int, str]]:
    """(i, j, reason) of the pairs that share something, sorted."""
    found: dict[tuple[int, int], str] = {}
    for sequence in sorted({name for entry in first for name in entry.fingerprint}):
        for i, j, value in _correlated(first, second, sequence):
            found.setdefault((i, j), f"same image ({sequence}, correlation {value:.4f})")
    by_patient = defaultdict(list)
    for j, entry in enumerate(second):
        by_patient[entry.patient].append(j)
    for i, entry in enumerate(first):
        found.update({(i, j): f"same patient {entry.patient}" for j in by_patient.get(entry.patient, ())})
    return [(i, j, reason) for (i, j), reason in sorted(found.items())]


def _correlated(first: list[SubjectEntry], second: list[SubjectEntry], sequence: str) -> Iterator[tuple[int, int, float]]:
    """Pairs whose image of `sequence` is the same, block against block: one matrix product each."""
    rows = [i for i, entry in enumerate(first) if sequence in entry.fingerprint]
    columns = [j for j, entry in enumerate(second) if sequence in entry.fingerprint]
    for lower in range(0, len(rows), BLOCK_SUBJECTS):
        row_block = rows[lower : lower + BLOCK_SUBJECTS]
        left = _unit([first[i] for i in row_block], sequence)
        for start in range(0, len(columns), BLOCK_SUBJECTS):
            column_block = columns[start : start + BLOCK_SUBJECTS]
            correlation = left @ _unit([second[j] for j in column_block], sequence).T
            for r, c in np.argwhere(correlation > SAME_SUBJECT_CORRELATION):
                yield row_block[r], column_block[c], float(correlation[r, c])


def _unit(entries: list[SubjectEntry], sequence: str) -> NDArray[np.float32]:
    """Fingerprints (N, 4096), centred and of length 1. UserError if one is not made of numbers."""
    values = np.empty((len(entries), BLOCKS**3), np.float32)
    for row, entry in zip(values, entries):
        row[:] = decode(entry.fingerprint[sequence])
        if not np.isfinite(row).all():
            raise UserError(f"index.json: the fingerprint of subject {entry.subject}, {sequence}, is not finite; build the shard set again")
    values -= values.mean(axis=1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
