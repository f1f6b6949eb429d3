"""Folders of images, recordings and vectors -> a shard set for classification.

    SRC/images/<class>/<id>.png     SRC/audio/<class>/<id>.wav     SRC/embeddings.csv (id, numbers)     SRC/patients.csv (id, patient)

Two views or more; files with the same id are views of one subject, and a subject may lack a view. The same files and
settings give byte-identical tars.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mstkd.errors import UserError
from mstkd.files import whole_file
from mstkd.shards.layout import INDEX, SEQUENCE_NAME, SPLITS, write_model
from mstkd.shards.members import encode_array
from mstkd.shards.progress import say, subject_progress
from mstkd.shards.shard_writer import add_member, shard_entry, tar_writer
from mstkd.shards.spec import META, SUBJECT_KEY, Classification, ShardEntry, ShardIndex, SubjectEntry, ViewMeta, ViewStats, view_member
from mstkd.shards.splits import read_explicit_splits, splits_by_class
from mstkd.shards.view_readers import BANDS, FRAMES, read_image, read_spectrogram, read_table, read_vectors

FOLDERS = {"image": ("images", ".png"), "audio": ("audio", ".wav")}  # view -> folder of classes, ending of its files
VECTORS, PATIENTS = "embeddings.csv", "patients.csv"
EMBEDDING = "embedding"
LARGEST = 1e30  # of a value in a file; its square is still a number


@dataclass
class Subject:
    """What the source has of one subject."""

    key: str
    label: str
    patient: str
    files: dict[str, Path] = field(default_factory=dict)  # by view; of an embedding the table it is in


def build_views(
    src: Path, out: Path, *, name: str = "views", seconds: float = 1.0, seed: int = 0, splits: Path | None = None,
    allow_overlap: bool = False, subjects_per_shard: int = 100,
) -> ShardIndex:  # fmt: skip
    """Build the shard set `out` from the folder `src`; `out` appears complete or not at all.

    Recordings are cut or padded to `seconds`. `name` is the data set's, and begins the tars' names. `splits` is a file
    written by a person; without it 20 % test and 5 folds, by patient and stratified by class. Raises UserError: `out`
    exists, nothing or one view alone to read, a file that cannot be read or has another shape than the others, an id
    in two classes, a table with ids that no file has.
    """
    src, out = Path(src), Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; use another --out or remove it")
    if not SEQUENCE_NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: use letters, digits, - and _")
    vectors = read_vectors(src / VECTORS) if (src / VECTORS).is_file() else {}
    subjects = find_subjects(src, vectors)
    reader = _Reader(seconds, vectors)
    patients = {subject.key: subject.patient for subject in subjects}
    classes = {subject.key: subject.label for subject in subjects}
    chosen = read_explicit_splits(splits, patients, allow_overlap) if splits else splits_by_class(patients, classes, seed)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        raise UserError(f"{partial}: left by a build that was ended, or another one is at work; remove it if none is")
    partial.mkdir(parents=True)
    try:
        index = _write_set(partial, name, subjects, reader, subjects_per_shard)
        write_model(partial / INDEX, index)
        write_model(partial / SPLITS, chosen)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    lacking = Counter(view for subject in subjects for view in index.sequences if view not in subject.files)
    for view, count in lacking.items():
        say(f"{count} of {len(subjects)} subjects lack {view}")
    return index


def find_subjects(src: Path, vectors: dict[str, NDArray]) -> list[Subject]:
    """The subjects under `src` in the order in which they are stored: by a hash of the key, so that every tar has all classes."""
    if not src.is_dir():
        raise UserError(f"{src}: no such folder")
    found: dict[str, Subject] = {}
    for view in FOLDERS:
        for label, path in _files(src, view):
            subject = found.setdefault(path.stem, Subject(path.stem, label, path.stem))
            if subject.label != label:
                raise UserError(f"{path}: {path.stem} is in class {subject.label} too ({next(iter(subject.files.values()))}); an id belongs to one class")
            subject.files[view] = path
    if unknown := sorted(vectors.keys() - found.keys()):
        raise UserError(f"{src / VECTORS}: id {unknown[0]!r} has no file, and so no class; remove its line or add the file")
    for key in vectors:
        found[key].files[EMBEDDING] = src / VECTORS
    views = {view for subject in found.values() for view in subject.files}
    if len(views) < 2:
        held = f"{next(iter(views))} alone" if views else "none"
        raise UserError(f"{src}: two views are needed, there is {held}; expected two of images/<class>/<id>.png, audio/<class>/<id>.wav, {VECTORS}")
    if len(labels := {subject.label for subject in found.values()}) < 2:
        raise UserError(f"{src}: all subjects are of class {labels.pop()}; classes are folders, give at least two")
    _set_patients(src / PATIENTS, found)
    return sorted(found.values(), key=lambda subject: hashlib.sha256(subject.key.encode()).hexdigest())


def _files(src: Path, view: str) -> Iterator[tuple[str, Path]]:
    """Class and path of every file of a view. Raises UserError on what is none or cannot be a key."""
    folder, ending = FOLDERS[view]
    if not (src / folder).is_dir():
        return
    for inner in sorted(path for path in (src / folder).iterdir() if not path.name.startswith(".")):
        if not inner.is_dir() or not SEQUENCE_NAME.fullmatch(inner.name):
            raise UserError(f"{inner}: not a folder named as a class (letters, digits, - and _); remove or rename it")
        for path in sorted(path for path in inner.iterdir() if not path.name.startswith(".")):
            if path.suffix != ending or not SUBJECT_KEY.fullmatch(path.stem):
                raise UserError(f"{path}: expected <id>{ending}, the id of letters, digits, - and _; convert, rename or remove it")
            yield inner.name, path


def _set_patients(path: Path, subjects: dict[str, Subject]) -> None:
    if not path.is_file():
        return
    table = read_table(path)
    for key, subject in subjects.items():
        if key not in table or not SUBJECT_KEY.fullmatch(table[key][0]):
            raise UserError(f"{path}: no patient of letters, digits, - and _ for id {key!r}; add a line id,patient")
        subject.patient = table[key][0]


class _Reader:
    """Reads views, and sees to it that all arrays of a view have one shape."""

    def __init__(self, seconds: float, vectors: dict[str, NDArray]):
        self.seconds, self._vectors = seconds, vectors
        self._first: dict[str, tuple[tuple[int, ...], Path]] = {}  # by view

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {view: shape for view, (shape, _) in self._first.items()}

    def read(self, subject: Subject, view: str) -> tuple[NDArray[np.float16], ViewStats]:
        """A view z-scored over its own values, a constant one 0 throughout."""
        path = subject.files[view]
        readers: dict[str, Callable[[], NDArray]] = {
            "image": lambda: read_image(path), "audio": lambda: read_spectrogram(path, self.seconds), EMBEDDING: lambda: self._vectors[subject.key],
        }  # fmt: skip
        raw = readers[view]().astype(np.float64)
        shape, first = self._first.setdefault(view, (raw.shape, path))
        if raw.shape != shape:
            raise UserError(f"{path}: {' x '.join(map(str, raw.shape))} values, {first} has {' x '.join(map(str, shape))}; bring them to one size")
        if not (np.abs(raw) < LARGEST).all():  # nor for NaN
            raise UserError(f"{path}: {subject.key} holds values that are not finite or too large; correct them")
        mean, std = float(raw.mean()), float(raw.std())
        return ((raw - mean) / (std or 1.0)).astype(np.float16), ViewStats(mean=mean, std=std)


def _write_set(folder: Path, name: str, subjects: list[Subject], reader: _Reader, subjects_per_shard: int) -> ShardIndex:
    """The tars, and the index of them."""
    order = [*FOLDERS, EMBEDDING]
    there = {view for subject in subjects for view in subject.files}
    sequences = tuple(view for view in order if view in there)
    shards = []
    with subject_progress(name, len(subjects)) as tally:
        for start in range(0, len(subjects), subjects_per_shard):
            tar = folder / f"{name}-{start // subjects_per_shard:06d}.tar"
            shards.append(_write_tar(tar, subjects[start : start + subjects_per_shard], sequences, reader))
            tally(len(shards[-1].subjects), shards[-1].bytes)
    made = {"name": name, "seconds": reader.seconds, "bands": BANDS, "frames": FRAMES}
    return ShardIndex(
        dataset=name,
        spec_sha256=hashlib.sha256(json.dumps(made).encode()).hexdigest(),
        sequences=sequences,
        label_scheme=None,
        classification=Classification(
            views={view: reader.shapes[view] for view in sequences}, classes=tuple(sorted({subject.label for subject in subjects}))
        ),
        shards=tuple(shards),
    )


def _write_tar(tar: Path, subjects: list[Subject], sequences: tuple[str, ...], reader: _Reader) -> ShardEntry:
    entries = []
    with whole_file(tar) as stream, tar_writer(stream) as writer:
        for subject in subjects:
            present, stats = tuple(view for view in sequences if view in subject.files), {}
            for view in present:
                array, stats[view] = reader.read(subject, view)
                add_member(writer, subject.key, view_member(view), encode_array(array))
            meta = ViewMeta(subject=subject.key, patient=subject.patient, sequences=present, label=subject.label, stats=stats)
            add_member(writer, subject.key, META, meta.model_dump_json().encode())
            # no fingerprint of the content: small images of one class resemble each other more than two scans of a head
            entries.append(SubjectEntry(subject=subject.key, patient=subject.patient, sequences=present, members={}, fingerprint={}))
    return shard_entry(tar, entries)
