"""Does a shard set hold exactly what its index says, and does all of it decode?"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from mstkd.errors import UserError
from mstkd.files import sha256_of
from mstkd.shards import fingerprint
from mstkd.shards.layout import FINGERPRINT, SPLITS, allowed_members, read_plain_file, read_set, unlisted_tars
from mstkd.shards.members import JSON_LIMIT_BYTES, decode_json, decode_meta, decode_view_meta, read_member, read_payload
from mstkd.shards.meta_check import check_meta
from mstkd.shards.pool import Tally, run_jobs
from mstkd.shards.progress import subject_progress
from mstkd.shards.shard_writer import label_volumes_ml
from mstkd.shards.spec import (
    BRAIN, CLAHE, FILE_LABEL, IMAGE, LABEL, META, SUBJECT_KEY, LabelScheme, ShardEntry, ShardIndex, SubjectEntry, SubjectMeta, ViewMeta, view_member,
)  # fmt: skip
from mstkd.shards.splits import check_splits
from mstkd.shards.tar_walk import Member, split_name, walk

SHOWN_PROBLEMS = 20


def verify(folder: Path, workers: int = 1) -> ShardIndex:
    """Read every byte of the shard set `folder`, with `workers` processes, and return its index.

    Raises UserError naming every damaged tar (the first 20), a line each, in the order of the set, with the subject
    where one is at fault: a file that is missing, cut, changed or not in the index; members that are extra, missing,
    apart, elsewhere or not decodable; arrays that contradict each other or the index. An index or splits that cannot
    be true is one line of its own, before any tar is opened.
    """
    folder = Path(folder)
    index, splits = read_set(folder)
    if workers < 1:
        raise UserError(f"workers {workers}: give 1 or more")
    check_splits(splits, {subject: entry.patient for subject, entry in index.subjects().items()}, str(folder / SPLITS))
    _check_summary(folder, index)
    problems = _tar_problems(folder, index, workers)
    problems += [f"{folder / name}: not in index.json; remove it or rebuild the set" for name in unlisted_tars(folder, index)]
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = [f"... and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise UserError("\n".join([f"{folder}: {len(problems)} of its tars are wrong:", *problems[:SHOWN_PROBLEMS], *more]))
    return index


def _check_summary(folder: Path, index: ShardIndex) -> None:
    """fingerprint.json, where there is one, speaks of as many subjects as the index."""
    path = folder / FINGERPRINT
    try:
        summary = decode_json(read_plain_file(path, JSON_LIMIT_BYTES))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); rebuild the set") from None
    counted = summary.get("subjects") if isinstance(summary, dict) else None
    if counted != len(index.subjects()):
        raise UserError(f"{path}: is about {counted} subjects, index.json lists {len(index.subjects())}; rebuild the set")


def _tar_problems(folder: Path, index: ShardIndex, workers: int) -> list[str]:
    """What is wrong with the tars, in the order of the set, whichever is read first."""
    facts = index.model_copy(update={"shards": ()})  # all that a tar's check needs; the rest would be sent with every job
    jobs = [(folder / shard.file, shard, facts) for shard in index.shards]
    with subject_progress(f"{index.dataset}: verify", len(index.subjects())) as tally:
        problems = dict(run_jobs(_tar_problem, jobs, workers, tally))
    return [problems[shard.file] for shard in index.shards if problems[shard.file]]


def _tar_problem(tar: Path, shard: ShardEntry, index: ShardIndex, tally: Tally) -> tuple[str, str | None]:
    """The tar's name and the first thing wrong with it, in one line. `index` may lack its shards."""
    try:
        _check_shard(tar, shard, index, tally)
    except UserError as error:
        return shard.file, str(error)
    except OSError as error:
        return shard.file, f"{tar}: cannot be read ({error.strerror}); copy it again"
    return shard.file, None


def _check_shard(tar: Path, shard: ShardEntry, index: ShardIndex, tally: Tally) -> None:
    if not tar.is_file():
        raise UserError(f"{tar}: no such file in the set; copy the set again")
    size = tar.stat().st_size
    if size < shard.bytes:
        raise UserError(f"{tar}: truncated, {size} of {shard.bytes} bytes; copy it again")
    _check_members(tar, shard, index)
    if size != shard.bytes or sha256_of(tar) != shard.sha256:
        raise UserError(f"{tar}: changed since it was built ({size} bytes, index {shard.bytes}; sha256 differs); copy it again or rebuild")
    for entry in shard.subjects:
        try:
            (_check_content if index.classification is None else _check_views)(tar, entry, index)
        except ValueError as error:
            raise UserError(f"{tar}: subject {entry.subject}: {error}; rebuild the set") from None
        tally(1, sum(size for _, size in entry.members.values()))


def _check_members(tar: Path, shard: ShardEntry, index: ShardIndex) -> None:
    """The tar's members are those of the index, in its order (so a subject's are adjacent), at its offsets."""
    allowed = allowed_members(index)
    expected = {f"{entry.subject}.{name}": entry.members[name] for entry in shard.subjects for name in entry.members}
    try:
        members = list(walk(tar))
    except ValueError as error:
        raise UserError(f"{tar}: not a readable tar of plain files ({error}); copy it again") from None
    counts = Counter(member.name for member in members)
    for member in members:
        _check_member(tar, member, counts, expected, allowed)
    for name in expected:
        if counts[name] != 1:
            subject = name.partition(".")[0]
            raise UserError(f"{tar}: subject {subject}: member {name!r} is there {counts[name]} times, not once; copy it again")
    wrong = next((member.name for member, right in zip(members, expected) if member.name != right), None)
    if wrong:
        raise UserError(f"{tar}: subject {wrong.partition('.')[0]}: its members are not adjacent and in order; rebuild the set")


def _check_member(tar: Path, member: Member, counts: Counter, expected: dict[str, tuple[int, int]], allowed: tuple[str, ...]) -> None:
    subject = member.name.partition(".")[0]
    place = f"{tar}: subject {subject}" if SUBJECT_KEY.fullmatch(subject) else str(tar)
    try:
        _, suffix = split_name(member.name)
    except ValueError as error:
        raise UserError(f"{place}: {error}; rebuild it") from None
    if suffix not in allowed:
        raise UserError(f"{place}: member {member.name!r} does not belong in a shard set; rebuild it")
    if member.name not in expected:
        raise UserError(f"{place}: member {member.name!r} is not in index.json; rebuild the set")
    if counts[member.name] == 1 and expected[member.name] != (member.offset, member.size):
        raise UserError(f"{place}: {suffix} lies at {member.offset}, {member.size} bytes; index.json says {expected[member.name]}")


def _check_content(tar: Path, entry: SubjectEntry, index: ShardIndex) -> None:
    """ValueError if a subject's members contradict each other or the index."""
    missing = {IMAGE, BRAIN, META} - set(entry.members)
    if missing:
        raise ValueError(f"has no {sorted(missing)[0]}")
    members = {suffix: read_member(tar, entry, suffix) for suffix in entry.members if suffix != META}
    meta = _meta(decode_meta, read_payload(tar, *entry.members[META]))
    if (meta.subject, meta.patient, meta.sequences) != (entry.subject, entry.patient, entry.sequences):
        raise ValueError(f"{META} and index.json disagree on subject, patient or sequences")
    check_meta(meta)
    image, brain = members[IMAGE], members[BRAIN]
    shape = tuple(stop - start for start, stop in meta.crop_box)
    if entry.shape not in (None, shape):
        raise ValueError(f"index.json has shape {entry.shape}, {META} has a box of {shape}")
    _check_array(IMAGE, image, np.float16, (len(index.sequences), *shape))
    _check_array(BRAIN, brain, np.uint8, shape)
    if not np.isfinite(image).all() or image[:, brain == 0].any():
        raise ValueError(f"{IMAGE} is not finite, or not 0 outside the brain")
    _check_channels(image, entry, index)
    if LABEL in members:
        _check_array(LABEL, members[LABEL], np.uint8, shape)
        _check_label(members[LABEL], meta, entry, index.scheme)
    if CLAHE in members:
        _check_array(CLAHE, members[CLAHE], np.float16, image.shape)
        if not ((members[CLAHE] >= 0) & (members[CLAHE] <= 1)).all() or members[CLAHE][:, brain == 0].any():
            raise ValueError(f"{CLAHE} is not within 0 and 1, or not 0 outside the brain")
    if FILE_LABEL in members:
        _check_array(FILE_LABEL, members[FILE_LABEL], np.uint8, meta.original_shape)
        _check_values(FILE_LABEL, members[FILE_LABEL], index.scheme)


def _check_views(tar: Path, entry: SubjectEntry, index: ShardIndex) -> None:
    """As `_check_content`, in a set for classification."""
    facts, meta = index.classification, _meta(decode_view_meta, read_payload(tar, *entry.members[META]))
    if (meta.subject, meta.patient, meta.sequences) != (entry.subject, entry.patient, entry.sequences):
        raise ValueError(f"{META} and index.json disagree on subject, patient or views")
    if meta.label not in facts.classes or set(meta.stats) != set(meta.sequences):
        raise ValueError(f"{META} has a class that index.json does not know, or not the mean and std of every view")
    for name in entry.sequences:
        view = read_member(tar, entry, view_member(name))
        _check_array(view_member(name), view, np.float16, facts.views[name])
        if not np.isfinite(view).all():
            raise ValueError(f"{view_member(name)} is not finite")


def _meta(decode: Callable[[bytes], SubjectMeta | ViewMeta], payload: bytes) -> SubjectMeta | ViewMeta:
    try:
        return decode(payload)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{META}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{META}: {error}") from None


def _check_array(suffix: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{suffix} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")


def _check_channels(image: np.ndarray, entry: SubjectEntry, index: ShardIndex) -> None:
    for name, volume in zip(index.sequences, image):
        if (name in entry.sequences) != (name in entry.fingerprint) or (name not in entry.sequences and volume.any()):
            raise ValueError(f"sequence {name}: image, fingerprint and list of sequences disagree")
        if name not in entry.sequences:
            continue
        stored, actual = fingerprint.decode(entry.fingerprint[name]), fingerprint.decode(fingerprint.encode(volume))
        if not np.allclose(stored, actual, rtol=2e-3, atol=1e-3):  # a float16 rounding step
            raise ValueError(f"sequence {name}: index.json has the fingerprint of another image")
        bounds = (float(volume.min()), float(volume.max()))
        if name in entry.ranges and entry.ranges[name] != bounds:
            raise ValueError(f"sequence {name}: index.json has the range {entry.ranges[name]}, the image {bounds}")


def _check_label(label: np.ndarray, meta: SubjectMeta, entry: SubjectEntry, scheme: LabelScheme | None) -> None:
    _check_values(LABEL, label, scheme)
    volumes = label_volumes_ml(label, scheme, meta.spacing_mm)
    if volumes.keys() != entry.label_volume_ml.keys() or any(abs(volumes[k] - entry.label_volume_ml[k]) > 1e-6 for k in volumes):
        raise ValueError("index.json has other label volumes than the label map")


def _check_values(suffix: str, label: np.ndarray, scheme: LabelScheme | None) -> None:
    if scheme is None or not np.isin(label, scheme.values).all():
        raise ValueError(f"{suffix} holds values outside the declared scheme")
