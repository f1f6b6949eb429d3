"""`index.json`, `splits.json` and `fingerprint.json` for WebDataset tars that others wrote.

Nothing is believed: names, places, types, values and meta data of every member are checked before the first file is
written, and nothing but plain arrays and JSON is decoded.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from mstkd.errors import UserError
from mstkd.shards.dataset import DatasetSpec, load_spec
from mstkd.shards.dataset_fingerprint import write_fingerprint
from mstkd.shards.facts import SubjectFacts, subject_facts
from mstkd.shards.layout import INDEX, SPLITS, parse_index, parse_splits, write_model
from mstkd.shards.meta_check import check_meta
from mstkd.shards.members import decode_array, decode_meta, read_payload
from mstkd.shards.pool import Tally, run_jobs
from mstkd.shards.progress import say, subject_progress
from mstkd.shards.shard_writer import shard_entry, subject_entry
from mstkd.shards.spec import BRAIN, IMAGE, LABEL, META, LabelScheme, ShardEntry, ShardIndex, Splits, SubjectEntry, SubjectMeta
from mstkd.shards.splits import check_patient_count, check_splits, default_splits, read_explicit_splits, stratifying_volumes_ml
from mstkd.shards.tar_walk import split_name, walk

STORED = (IMAGE, BRAIN, LABEL, META)
REQUIRED = (IMAGE, BRAIN, META)
META_NEEDS = ", ".join(name for name, field in SubjectMeta.model_fields.items() if field.is_required())

Members = dict[str, tuple[int, int]]  # suffix -> (offset, bytes), in the tar's order


@dataclass(frozen=True)
class Declared:
    """What a set's subjects have in common."""

    sequences: tuple[str, ...]
    scheme: LabelScheme | None


def index_foreign(folder: Path, spec: str | Path | None = None, workers: int = 1, seed: int = 0, splits: Path | None = None) -> ShardIndex:
    """Make a shard set of the tars in `folder`: check every member, write index.json, splits.json and fingerprint.json.

    Members are `<key>.image.npy` float16 (M, X, Y, Z), `.brain.npy` and `.label.npy` uint8 (X, Y, Z) and `.meta.json`,
    a key's members adjacent, in any order. Sequences and label scheme come from `spec`; without it the sequences from
    the meta data, and labels are refused. `splits` is a file written by a person; without it a splits.json that is
    there already is checked and kept, else the default one of `seed` is made.
    Raises UserError at the first thing that does not fit, naming tar and subject; then nothing is written.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no *.tar in it; give the folder of WebDataset tars")
    if (folder / INDEX).exists():
        raise UserError(f"{folder / INDEX}: exists already; check the set with mstkd shards verify, or remove it to index anew")
    dataset = None if spec is None else load_spec(spec)
    layout = {tar: _layout(tar) for tar in tars}
    _check_keys(layout)
    metas = {f"{tar}: subject {subject}": _meta(tar, subject, members) for tar, own in layout.items() for subject, members in own.items()}
    chosen = _splits(folder, splits, {meta.subject: meta.patient for meta in metas.values()}, dataset)
    declared = Declared(tuple(dataset.sequences), dataset.scheme) if dataset else Declared(_sequences(metas), None)
    shards, facts = _indexed(folder, layout, declared, workers)
    index = ShardIndex(
        dataset=dataset.name if dataset else folder.resolve().name,
        spec_sha256=dataset.sha256() if dataset else "none",
        sequences=declared.sequences,
        label_scheme=dataset.label_scheme if dataset else None,
        shards=shards,
    )
    parse_index(index.model_dump_json().encode(), str(folder / INDEX))  # also what only the index's readers ask for
    say(_write(folder, index, facts, chosen, seed))
    return index


def _splits(folder: Path, given: Path | None, patients: dict[str, str], dataset: DatasetSpec | None) -> Splits | None:
    """The splits of `given`, or those that lie in `folder`, checked; None if there are none. Raises UserError."""
    own = folder / SPLITS
    if given is not None:
        if own.exists():
            raise UserError(f"{own}: exists already; remove it, or leave out --splits to keep it")
        return read_explicit_splits(given, patients, False, dataset)
    if own.exists():
        splits = parse_splits(own.read_bytes(), str(own))
        check_splits(splits, patients, str(own))
        return splits
    check_patient_count(patients)
    return None


def _layout(tar: Path) -> dict[str, Members]:
    """Subject -> its members, from the tar's headers. Raises UserError."""
    try:
        members = [(*split_name(member.name), member) for member in walk(tar)]
    except ValueError as error:
        raise UserError(f"{tar}: {error}; a set is made of plain, uncompressed tars of <key>.image.npy and so on") from None
    found: dict[str, Members] = {}
    for subject, group in groupby(members, key=lambda row: row[0]):
        if subject in found:
            raise UserError(f"{tar}: subject {subject}: its members are not adjacent; write each subject's one after another")
        found[subject] = {}
        for _, suffix, member in group:
            if suffix not in STORED:
                raise UserError(f"{tar}: member {member.name!r}: what follows the first dot must be one of {', '.join(STORED)}; keys have no dots")
            if suffix in found[subject]:
                raise UserError(f"{tar}: member {member.name!r} is there twice; write it once")
            found[subject][suffix] = (member.offset, member.size)
    for subject, own in found.items():
        missing = next((suffix for suffix in REQUIRED if suffix not in own), None)
        if missing:
            needs = f"; it needs {META_NEEDS}" if missing == META else ""
            raise UserError(f"{tar}: subject {subject}: no {missing}{needs}")
    return found


def _check_keys(layout: dict[Path, dict[str, Members]]) -> None:
    seen: dict[str, Path] = {}
    for tar, subjects in layout.items():
        for subject in subjects:
            if subject in seen:
                raise UserError(f"{tar}: subject {subject} is in {seen[subject].name} too; keep one")
            seen[subject] = tar
    if not seen:
        raise UserError(f"{next(iter(layout)).parent}: its tars hold no subject")


def _sequences(metas: dict[str, SubjectMeta]) -> tuple[str, ...]:
    """The sequences that subjects' meta data name: those of one that has them all. Raises UserError, naming the place, if none has."""
    whole = max((meta.sequences for meta in metas.values()), key=len)
    for place, meta in metas.items():
        if meta.sequences != tuple(name for name in whole if name in meta.sequences):
            raise UserError(f"{place}: sequences {', '.join(meta.sequences)} are no part of {', '.join(whole)}, in that order; give --spec")
    return whole


def _indexed(folder: Path, layout: dict[Path, dict[str, Members]], declared: Declared, workers: int) -> tuple[tuple[ShardEntry, ...], list[SubjectFacts]]:
    """Every tar's entry, and the facts of all subjects, in the order of the set."""
    jobs = [(tar, subjects, declared) for tar, subjects in layout.items()]
    done = {}
    with subject_progress(f"{folder.name}: index", sum(map(len, layout.values()))) as tally:
        for entry, facts in run_jobs(index_tar, jobs, workers, tally):
            done[entry.file] = (entry, facts)
    ordered = [done[tar.name] for tar in layout]
    return tuple(entry for entry, _ in ordered), [fact for _, facts in ordered for fact in facts]


def index_tar(tar: Path, subjects: dict[str, Members], declared: Declared, tally: Tally) -> tuple[ShardEntry, list[SubjectFacts]]:
    """A tar's entry and its subjects' facts. Raises UserError naming the subject whose members do not fit."""
    entries, facts = [], []
    for subject, members in subjects.items():
        entry, fact = _subject(tar, subject, members, declared)
        entries.append(entry)
        facts.append(fact)
        tally(1, sum(size for _, size in members.values()))
    return shard_entry(tar, entries), facts


def _subject(tar: Path, subject: str, members: Members, declared: Declared) -> tuple[SubjectEntry, SubjectFacts]:
    meta = _meta(tar, subject, members)
    shape = tuple(stop - start for start, stop in meta.crop_box)
    try:
        _check_meta(meta, declared)
        image = _array(tar, members, IMAGE, np.float16, (len(declared.sequences), *shape))
        brain = _array(tar, members, BRAIN, np.uint8, shape)
        label = _array(tar, members, LABEL, np.uint8, shape) if LABEL in members else None
        _check_values(image, brain, label, meta, declared)
    except ValueError as error:
        raise UserError(f"{tar}: subject {subject}: {error}") from None
    entry = subject_entry(image, label, subject, meta.patient, meta.sequences, declared.sequences, declared.scheme, meta.spacing_mm)
    return entry, subject_facts(image, brain, label, meta, declared.sequences, declared.scheme)


def _meta(tar: Path, subject: str, members: Members) -> SubjectMeta:
    place = f"{tar}: subject {subject}: {META}"
    try:
        meta = decode_meta(read_payload(tar, *members[META]))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{place}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; it needs {META_NEEDS}") from None
    except ValueError as error:
        raise UserError(f"{place}: {error}; it needs {META_NEEDS}") from None
    if meta.subject != subject:
        raise UserError(f"{place}: is about subject {meta.subject}; the key must be the same")
    return meta


def _check_meta(meta: SubjectMeta, declared: Declared) -> None:
    if not meta.sequences or meta.sequences != tuple(name for name in declared.sequences if name in meta.sequences):
        raise ValueError(f"{META} lists sequences {', '.join(meta.sequences)}; expected some of {', '.join(declared.sequences)}, in that order")
    if set(meta.stats) != set(meta.sequences):
        raise ValueError(f"{META}: stats must have exactly the sequences {', '.join(meta.sequences)}")
    check_meta(meta)


def _array(tar: Path, members: Members, suffix: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = decode_array(read_payload(tar, *members[suffix]))
    except ValueError as error:
        raise ValueError(f"{suffix} cannot be decoded ({error})") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{suffix} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape}, the box that {META} gives")
    return array


def _check_values(image: np.ndarray, brain: np.ndarray, label: np.ndarray | None, meta: SubjectMeta, declared: Declared) -> None:
    if not np.isfinite(image).all():
        raise ValueError(f"{IMAGE} holds NaN or infinite values; expected z-scores")
    if brain.max() > 1 or not brain.any():
        raise ValueError(f"{BRAIN} must hold 0 and 1, and some 1")
    if image[:, brain == 0].any():
        raise ValueError(f"{IMAGE} must be exactly 0 where {BRAIN} is 0")
    for name, volume in zip(declared.sequences, image):
        if name not in meta.sequences and volume.any():
            raise ValueError(f"{META} does not list {name}, but {IMAGE} has voxels in its channel")
    if label is None:
        return
    if declared.scheme is None:
        raise ValueError(f"{LABEL} is there, but no label scheme is known; name it with --spec")
    strange = np.setdiff1d(label, declared.scheme.values)
    if strange.size:
        allowed = ", ".join(map(str, declared.scheme.values))
        raise ValueError(f"{LABEL} holds {', '.join(map(str, strange[:5]))}, which scheme {declared.scheme.name} ({allowed}) does not have")


def _write(folder: Path, index: ShardIndex, facts: list[SubjectFacts], splits: Splits | None, seed: int) -> str:
    """Write the files, index.json last: it is what makes the folder a set. The fingerprint's text comes back."""
    if splits is None:
        patients = {subject: entry.patient for subject, entry in index.subjects().items()}
        splits = default_splits(patients, stratifying_volumes_ml(index), seed)
    if not (folder / SPLITS).exists():
        write_model(folder / SPLITS, splits)
    text = write_fingerprint(folder, facts, index)
    write_model(folder / INDEX, index)
    return text
