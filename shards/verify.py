"""Does a shard set hold exactly what its index says, and does all of it decode?"""

import tarfile
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from mstkd.errors import UserError
from mstkd.shards import fingerprint
from mstkd.shards.build import file_sha256, label_volumes_ml
from mstkd.shards.members import read_member
from mstkd.shards.spec import (
    BRAIN, IMAGE, LABEL, LABEL_SCHEMES, META, SUBJECT_KEY, LabelScheme, ShardEntry, ShardIndex, SubjectEntry, SubjectMeta,
    read_index, read_splits,
)  # fmt: skip
from mstkd.shards.splits import check_splits


def verify(folder: Path) -> ShardIndex:
    """Read every byte of the shard set `folder` and return its index.

    Raises UserError on the first problem, naming the tar and, where one is at fault, the subject: a file that is
    missing, cut, changed or not in the index; members that are extra, missing, apart, elsewhere or not decodable;
    arrays that contradict each other or the index; splits with unknown subjects or a patient on two sides.
    """
    folder = Path(folder)
    index = _read(folder, "index.json", read_index)
    splits = _read(folder, "splits.json", read_splits)
    _check_listing(folder, index)
    for shard in index.shards:
        _check_shard(folder / shard.file, shard, index)
    patients = {subject: entry.patient for subject, entry in index.subjects().items()}
    check_splits(splits, patients, str(folder / "splits.json"))
    return index


def _read(folder: Path, name: str, reader) -> ShardIndex:
    try:
        return reader(folder)
    except FileNotFoundError:
        raise UserError(f"{folder / name}: no such file; is this a shard set made by `mstkd shards build`?") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{folder / name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; rebuild the set") from None
    except ValueError as error:
        raise UserError(f"{folder / name}: not valid JSON ({error}); rebuild the set") from None


def _check_listing(folder: Path, index: ShardIndex) -> None:
    files = [shard.file for shard in index.shards]
    subjects = [entry.subject for shard in index.shards for entry in shard.subjects]
    for what, names in (("tar", files), ("subject", subjects)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"{folder / 'index.json'}: lists {what} {twice} twice; rebuild the set")
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise UserError(f"{folder / 'index.json'}: lists {outside[0]!r}, which is not a plain file name; rebuild the set")
    if not subjects:
        raise UserError(f"{folder / 'index.json'}: lists no subject; rebuild the set")
    if isinstance(index.label_scheme, str) and index.label_scheme not in LABEL_SCHEMES:
        raise UserError(f"{folder / 'index.json'}: label scheme {index.label_scheme!r} is unknown; known: {', '.join(LABEL_SCHEMES)}")
    stray = sorted(path.name for path in folder.glob("*.tar") if path.name not in files)
    if stray:
        raise UserError(f"{folder / stray[0]}: not in index.json; remove it or rebuild the set")


def _check_shard(tar: Path, shard: ShardEntry, index: ShardIndex) -> None:
    if not tar.is_file():
        raise UserError(f"{tar}: no such file in the set; copy the set again")
    size = tar.stat().st_size
    if size < shard.bytes:
        raise UserError(f"{tar}: truncated, {size} of {shard.bytes} bytes; copy it again")
    _check_members(tar, shard, index)
    if size != shard.bytes or file_sha256(tar) != shard.sha256:
        raise UserError(f"{tar}: changed since it was built ({size} bytes, index {shard.bytes}; sha256 differs); copy it again or rebuild")
    for entry in shard.subjects:
        try:
            _check_content(tar, entry, index)
        except ValueError as error:
            raise UserError(f"{tar}: subject {entry.subject}: {error}; rebuild the set") from None


def _check_members(tar: Path, shard: ShardEntry, index: ShardIndex) -> None:
    """The tar's members are those of the index, in its order (so a subject's are adjacent), at its offsets."""
    allowed = (IMAGE, BRAIN, LABEL, META, *index.extra_members)
    expected = {f"{entry.subject}.{name}": entry.members[name] for entry in shard.subjects for name in allowed if name in entry.members}
    try:
        with tarfile.open(tar, "r:") as archive:
            members = archive.getmembers()
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a readable tar ({error}); copy it again") from None
    names = [member.name for member in members]
    for member in members:
        subject, _, suffix = member.name.partition(".")
        place = f"{tar}: subject {subject}"
        if suffix not in allowed or not member.isreg() or not SUBJECT_KEY.fullmatch(subject):
            raise UserError(f"{place}: member {member.name!r} does not belong in a shard set; rebuild it")
        if member.name not in expected:
            raise UserError(f"{place}: member {member.name!r} is not in index.json; rebuild the set")
        if names.count(member.name) == 1 and expected[member.name] != (member.offset_data, member.size):
            raise UserError(f"{place}: {suffix} lies at {member.offset_data}, {member.size} bytes; index.json says {expected[member.name]}")
    for name in expected:
        if names.count(name) != 1:
            subject = name.partition(".")[0]
            raise UserError(f"{tar}: subject {subject}: member {name!r} is there {names.count(name)} times, not once; copy it again")
    if names != list(expected):
        wrong = next(name for name, right in zip(names, expected) if name != right)
        raise UserError(f"{tar}: subject {wrong.partition('.')[0]}: its members are not adjacent and in order; rebuild the set")


def _check_content(tar: Path, entry: SubjectEntry, index: ShardIndex) -> None:
    """ValueError if a subject's members contradict each other or the index."""
    missing = {IMAGE, BRAIN, META} - set(entry.members)
    if missing:
        raise ValueError(f"has no {sorted(missing)[0]}")
    members = {suffix: read_member(tar, entry, suffix) for suffix in entry.members}
    meta = _meta(members[META])
    if (meta.subject, meta.patient, meta.sequences) != (entry.subject, entry.patient, entry.sequences):
        raise ValueError(f"{META} and index.json disagree on subject, patient or sequences")
    image, brain = members[IMAGE], members[BRAIN]
    shape = tuple(stop - start for start, stop in meta.crop_box)
    if image.dtype != np.float16 or image.shape != (len(index.sequences), *shape):
        raise ValueError(f"{IMAGE} is {image.dtype} {image.shape}, expected float16 {(len(index.sequences), *shape)}")
    if brain.dtype != np.uint8 or brain.shape != shape:
        raise ValueError(f"{BRAIN} is {brain.dtype} {brain.shape}, expected uint8 {shape}")
    if not np.isfinite(image).all() or image[:, brain == 0].any():
        raise ValueError(f"{IMAGE} is not finite, or not 0 outside the brain")
    _check_fingerprints(image, entry, index)
    if LABEL in members:
        _check_label(members[LABEL], shape, meta, entry, index.scheme)


def _meta(values: dict) -> SubjectMeta:
    try:
        return SubjectMeta.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{META}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _check_fingerprints(image: np.ndarray, entry: SubjectEntry, index: ShardIndex) -> None:
    for name, volume in zip(index.sequences, image):
        if (name in entry.sequences) != (name in entry.fingerprint) or (name not in entry.sequences and volume.any()):
            raise ValueError(f"sequence {name}: image, fingerprint and list of sequences disagree")
        if name in entry.sequences:
            stored, actual = fingerprint.decode(entry.fingerprint[name]), fingerprint.decode(fingerprint.encode(volume))
            if stored.shape != actual.shape or not np.allclose(stored, actual, rtol=2e-3, atol=1e-3):  # a float16 rounding step
                raise ValueError(f"sequence {name}: index.json has the fingerprint of another image")


def _check_label(label: np.ndarray, shape: tuple[int, ...], meta: SubjectMeta, entry: SubjectEntry, scheme: LabelScheme | None) -> None:
    if label.dtype != np.uint8 or label.shape != shape:
        raise ValueError(f"{LABEL} is {label.dtype} {label.shape}, expected uint8 {shape}")
    if scheme is None or not np.isin(label, scheme.values).all():
        raise ValueError(f"{LABEL} holds values outside the declared scheme")
    volumes = label_volumes_ml(label, scheme, meta.spacing_mm)
    if volumes.keys() != entry.label_volume_ml.keys() or any(abs(volumes[k] - entry.label_volume_ml[k]) > 1e-6 for k in volumes):
        raise ValueError("index.json has other label volumes than the label map")
