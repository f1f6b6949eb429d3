"""One tar of a shard set, and what is known of it once it is written."""

import io
import math
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mstkd.errors import UserError
from mstkd.files import sha256_of, whole_file, write_text
from mstkd.shards import fingerprint
from mstkd.shards.cases import Case
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.facts import SubjectFacts
from mstkd.shards.half_precision import widened
from mstkd.shards.members import encode_array
from mstkd.shards.pool import Tally
from mstkd.shards.preprocess import Preprocessed, preprocess
from mstkd.shards.spec import BRAIN, CLAHE, FILE_LABEL, IMAGE, LABEL, META, LabelScheme, ShardEntry, Strict, SubjectEntry
from mstkd.shards.tar_walk import split_name, walk

Sources = dict[str, tuple[int, int]]  # file, relative to the source folder -> (bytes, modification time in ns)
COPY_BYTES = 2**20  # tarfile writes 16 KiB at a time


class ShardRecord(Strict):
    """What a finished tar leaves for the index; `plan` is the digest of the plan it was built by."""

    plan: str
    sources: Sources
    shard: ShardEntry
    facts: tuple[SubjectFacts, ...]


@dataclass(frozen=True)
class TarJob:
    """One tar to be built, by whatever process."""

    dataset: DatasetSpec
    cases: tuple[Case, ...]
    src: Path
    tar: Path
    record: Path
    plan: str


def build_tar(job: TarJob, tally: Tally) -> str:
    """Write a job's tar and then its record, each complete or not at all; the tar's name. Raises UserError on a bad case."""
    sources = sources_of(job.cases, job.src)  # before they are read: what changes meanwhile is noticed later
    with whole_file(job.tar) as stream:
        subjects = []
        with tar_writer(stream) as writer:
            for case in job.cases:
                subjects.append(_add_case(writer, case, job.dataset, tally))
    entries = [entry for entry, _ in subjects]
    record = ShardRecord(plan=job.plan, sources=sources, shard=shard_entry(job.tar, entries), facts=tuple(facts for _, facts in subjects))
    write_text(job.record, record.model_dump_json())
    return job.tar.name


def sources_of(cases: tuple[Case, ...], src: Path) -> Sources:
    """Size and modification time of every file of the cases. Raises UserError if one is gone."""
    found = {}
    for case in cases:
        for volume in (*case.files.values(), case.label, case.brain):
            if volume is None:
                continue
            pair = (volume.path, volume.path.with_suffix(".hdr")) if volume.path.suffix == ".img" else (volume.path,)
            for path in pair:
                try:
                    state = path.stat()
                except FileNotFoundError:
                    raise UserError(f"{path}: no such file any more") from None
                found[os.path.relpath(path, src)] = (state.st_size, state.st_mtime_ns)
    return found


def tar_writer(stream: BinaryIO) -> tarfile.TarFile:
    """A tar whose bytes depend on nothing but what is added.

    Python's own: WebDataset's writer makes the same bytes, but brings torch into every worker, 200 MB each.
    """
    return tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=COPY_BYTES)


def add_member(writer: tarfile.TarFile, subject: str, suffix: str, payload: bytes) -> int:
    """Append `<subject>.<suffix>`; its bytes."""
    info = tarfile.TarInfo(f"{subject}.{suffix}")
    info.size, info.mode, info.uname, info.gname = len(payload), 0o444, "mstkd", "mstkd"
    writer.addfile(info, io.BytesIO(payload))
    return len(payload)


def shard_entry(tar: Path, entries: list[SubjectEntry]) -> ShardEntry:
    """The index entry of a written tar whose subjects' `members` are not known yet. Raises ValueError if it is no sound tar."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for member in walk(tar):
        subject, suffix = split_name(member.name)
        places.setdefault(subject, {})[suffix] = (member.offset, member.size)
    return ShardEntry(
        file=tar.name,
        bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        subjects=tuple(entry.model_copy(update={"members": places[entry.subject]}) for entry in entries),
    )


def subject_entry(
    image: np.ndarray, label: np.ndarray | None, subject: str, patient: str, present: tuple[str, ...], sequences: tuple[str, ...],
    scheme: LabelScheme | None, spacing_mm: tuple[float, float, float],
) -> SubjectEntry:  # fmt: skip
    """The index entry of a stored subject: image (M, X, Y, Z) with channels `sequences`, label (X, Y, Z); no members yet."""
    ranges, fingerprints = {}, {}
    for name in present:
        volume = widened(image[sequences.index(name)])
        ranges[name] = (float(volume.min()), float(volume.max()))
        fingerprints[name] = fingerprint.encode(volume)
    return SubjectEntry(
        subject=subject,
        patient=patient,
        sequences=present,
        members={},
        shape=image.shape[1:],
        ranges=ranges,
        fingerprint=fingerprints,
        label_volume_ml={} if label is None else label_volumes_ml(label, scheme, spacing_mm),
    )


def label_volumes_ml(label: np.ndarray, scheme: LabelScheme, spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    """Volume in ml of each region of a label map (X, Y, Z)."""
    voxel_ml = math.prod(spacing_mm) / 1000
    counts = np.bincount(label[label != 0], minlength=max(scheme.values) + 1)  # no region holds 0
    return {region: float(counts[list(values)].sum() * voxel_ml) for region, values in scheme.regions.items()}


def _add_case(writer: tarfile.TarFile, case: Case, dataset: DatasetSpec, tally: Tally) -> tuple[SubjectEntry, SubjectFacts]:
    """Read, normalise and append one subject. A function of its own: what it held is free before the next one is read."""
    subject = preprocess(case, dataset)
    written = sum(add_member(writer, case.subject, suffix, payload) for suffix, payload in _payloads(subject))
    meta = subject.meta
    entry = subject_entry(
        subject.image, subject.label, meta.subject, meta.patient, meta.sequences, tuple(dataset.sequences), dataset.scheme, meta.spacing_mm
    )
    tally(1, written)
    return entry, subject.facts


def _payloads(subject: Preprocessed) -> Iterator[tuple[str, bytes]]:
    yield IMAGE, encode_array(subject.image)
    yield BRAIN, encode_array(subject.brain)
    if subject.label is not None:
        yield LABEL, encode_array(subject.label)
    if subject.clahe is not None:
        yield CLAHE, encode_array(subject.clahe)
    if subject.file_label is not None:
        yield FILE_LABEL, encode_array(subject.file_label)
    yield META, subject.meta.model_dump_json().encode()
