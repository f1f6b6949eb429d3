"""Subjects that two sets of cases share: by patient, or by what the images hold (BraTS years, FeTS and MSD overlap)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mstkd.config import DataConfig
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.evaluate.source import split_subjects
from mstkd.shards.fingerprint import SAME_SUBJECT_CORRELATION, decode
from mstkd.shards.spec import ShardIndex, SubjectEntry

Overlap = tuple[str, str, str]  # subject of a, subject of b, reason


def find_overlap(index_a: ShardIndex, subjects_a: Sequence[str], index_b: ShardIndex, subjects_b: Sequence[str]) -> list[Overlap]:
    """(subject of a, subject of b, reason) for every pair that shares a patient or, in some sequence, an image."""
    entries_a, entries_b = index_a.subjects(), index_b.subjects()
    first = [entries_a[key] for key in subjects_a]
    second = [entries_b[key] for key in subjects_b]
    found = {}
    for sequence in index_a.sequences:
        if sequence in index_b.sequences:
            for i, j, value in _correlated(first, second, sequence):
                found.setdefault((i, j), f"same image ({sequence}, correlation {value:.4f})")
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            if a.patient == b.patient:
                found[i, j] = f"same patient {a.patient}"
    return [(first[i].subject, second[j].subject, reason) for (i, j), reason in sorted(found.items())]


def overlap_with_training(
    training: Sequence[ShardStore], fold: int, stores: Sequence[ShardStore], split: str
) -> list[Overlap]:
    """Pairs of a subject that training saw and one of `split`; for "test" and "all" model selection counts as training."""
    seen = ("train",) if split == "val" else ("train", "val")
    return [
        pair
        for own in training
        for other in stores
        for part in seen
        for pair in find_overlap(own.index, split_subjects(own, part, fold), other.index, split_subjects(other, split, fold))
    ]


def refuse_overlap(stores: Sequence[ShardStore], config: DataConfig) -> None:
    """Raise UserError if a fold's training subject is also a validation or test subject, unless `data.allow_overlap`."""
    if config.allow_overlap:
        return
    for split in ("val", "test"):
        refuse(overlap_with_training(stores, config.fold, stores, split), split, "data.allow_overlap=true")


def refuse(found: Sequence[Overlap], split: str, permission: str) -> None:
    """Raise UserError naming the first pair, if there is one, and the `permission` that lets it pass."""
    if found:
        trained, other, reason = found[0]
        raise UserError(
            f"training subject {trained} and {split} subject {other}: {reason} ({len(found)} such pairs); repair splits.json, or say {permission}"
        )


def _correlated(first: list[SubjectEntry], second: list[SubjectEntry], sequence: str) -> list[tuple[int, int, float]]:
    rows = [i for i, entry in enumerate(first) if sequence in entry.fingerprint]
    columns = [j for j, entry in enumerate(second) if sequence in entry.fingerprint]
    if not rows or not columns:
        return []
    correlation = _unit([first[i] for i in rows], sequence) @ _unit([second[j] for j in columns], sequence).T
    return [(rows[i], columns[j], float(correlation[i, j])) for i, j in np.argwhere(correlation > SAME_SUBJECT_CORRELATION)]


def _unit(entries: list[SubjectEntry], sequence: str) -> NDArray[np.float32]:
    """Fingerprints (N, 4096), centred and of length 1."""
    values = np.stack([decode(entry.fingerprint[sequence]) for entry in entries])
    values -= values.mean(axis=1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
