"""What `index.json` and `splits.json` may say, checked before anything they name is opened, read or allocated."""

import base64
import binascii
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mstkd.errors import UserError
from mstkd.files import write_text
from mstkd.shards.scheme_check import check_scheme
from mstkd.shards.spec import (
    BRAIN, IMAGE, LABEL, LABEL_SCHEMES, META, SUBJECT_KEY, Classification, LabelScheme, ShardEntry, ShardIndex, Splits, SubjectEntry, view_member,
)  # fmt: skip
from mstkd.shards.tar_walk import BLOCK_BYTES, NAME_LIMIT_BYTES, SUFFIX, padded

INDEX, SPLITS, FINGERPRINT = "index.json", "splits.json", "fingerprint.json"
INDEX_LIMIT_BYTES = 2**30  # some 25 000 subjects of four sequences
SPLITS_LIMIT_BYTES = 2**26
TAR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}\.tar")
SEQUENCE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
FINGERPRINT_BYTES = 2 * 16**3
AXIS_LIMIT = 2**16  # voxels along one axis
STORED = (IMAGE, BRAIN, LABEL, META)
VOXEL_BYTES = {IMAGE: 2, BRAIN: 1, LABEL: 1}
Model = TypeVar("Model", bound=BaseModel)


def read_set(folder: Path) -> tuple[ShardIndex, Splits]:
    """The index and the splits of a local shard set. UserError: not there, not readable, or saying what cannot be."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"shard set {folder}: no such folder; make one with `mstkd shards build`")
    index = parse_index(_bytes(folder, INDEX, INDEX_LIMIT_BYTES), str(folder / INDEX))
    return index, parse_splits(_bytes(folder, SPLITS, SPLITS_LIMIT_BYTES), str(folder / SPLITS))


def write_model(path: Path, model: ShardIndex | Splits) -> None:
    """Write an index or splits as an indented JSON file, complete or not at all."""
    write_text(path, model.model_dump_json(indent=1) + "\n")


def parse_index(data: bytes, place: str) -> ShardIndex:
    """The index in the bytes of an index.json; `place` is named in errors. Raises UserError."""
    index = _parse(ShardIndex, data, place)
    try:
        _check_set(index)
        for shard in index.shards:
            _check_shard(shard, index)
    except ValueError as error:
        raise UserError(f"{place}: {error}; rebuild the set") from None
    return index


def parse_splits(data: bytes, place: str) -> Splits:
    """The splits in the bytes of a splits.json; whether they fit the index is `check_splits`'s part. Raises UserError."""
    return _parse(Splits, data, place)


def allowed_members(index: ShardIndex) -> tuple[str, ...]:
    """The suffixes that a subject of the set may have, in stored order."""
    stored = STORED if index.classification is None else (*map(view_member, index.classification.views), META)
    return (*stored, *index.extra_members)


def unlisted_tars(folder: Path, index: ShardIndex) -> list[str]:
    """Names of the tars in a local set's folder that its index does not know."""
    listed = {shard.file for shard in index.shards}
    return sorted(path.name for path in Path(folder).glob("*.tar") if path.name not in listed)


def read_plain_file(path: Path, limit_bytes: int) -> bytes:
    """A small file as a whole. UserError if it is no plain file, is larger than it may be, or cannot be read; FileNotFoundError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit_bytes:
            raise UserError(f"{path}: not a plain file of up to {limit_bytes} bytes; rebuild the set")
        with path.open("rb") as stream:
            return stream.read(found.st_size)  # `read` allocates what it is asked for, not what there is
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _bytes(folder: Path, name: str, limit_bytes: int) -> bytes:
    try:
        return read_plain_file(folder / name, limit_bytes)
    except FileNotFoundError:
        raise UserError(f"shard set {folder}: {name} is missing; is this the folder that `mstkd shards build` wrote?") from None


def _parse(model: type[Model], data: bytes, place: str) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            raise UserError(f"{place}: cannot be read, it is {problem['msg'][0].lower()}{problem['msg'][1:]}; rebuild the set") from None
        raise UserError(f"{place}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; rebuild the set") from None


def _check_set(index: ShardIndex) -> None:
    if not any(shard.subjects for shard in index.shards):
        raise ValueError("lists no subject")
    _once("tar", (shard.file for shard in index.shards))
    _once("subject", (entry.subject for shard in index.shards for entry in shard.subjects))
    _once("sequence", index.sequences)
    for name in index.sequences:
        _plain(SEQUENCE_NAME, name, "sequence name")
    for suffix in index.extra_members:
        _plain(SUFFIX, suffix, "name of an extra member (.npy or .json)")
    if index.classification is not None:
        _check_classification(index.classification, index.sequences)
    if isinstance(index.label_scheme, LabelScheme):
        check_scheme(index.label_scheme)
    elif index.label_scheme is not None and index.label_scheme not in LABEL_SCHEMES:
        raise ValueError(f"label scheme {index.label_scheme!r} is unknown; known: {', '.join(LABEL_SCHEMES)}")


def _check_classification(facts: Classification, sequences: tuple[str, ...]) -> None:
    if tuple(facts.views) != sequences:
        raise ValueError(f"classification: its views {', '.join(facts.views)} are not the sequences {', '.join(sequences)}")
    for name, shape in facts.views.items():
        if not shape or not all(0 < length <= AXIS_LIMIT for length in shape):
            raise ValueError(f"classification: view {name} has no shape of an array: {shape}")
    _once("class", facts.classes)
    for name in facts.classes:
        _plain(SEQUENCE_NAME, name, "class name")
    if len(facts.classes) < 2:
        raise ValueError("classification: fewer than two classes")


def _check_shard(shard: ShardEntry, index: ShardIndex) -> None:
    _plain(TAR_NAME, shard.file, "plain file name of a tar")
    if not SHA256.fullmatch(shard.sha256) or shard.bytes < BLOCK_BYTES:
        raise ValueError(f"{shard.file}: its sha256 is not 64 hex digits, or its size {shard.bytes} is not that of a tar")
    for entry in shard.subjects:
        for what, key in (("subject", entry.subject), ("patient", entry.patient)):
            _plain(SUBJECT_KEY, key, f"{what} key")
        try:
            _check_entry(entry, index)
        except ValueError as error:
            raise ValueError(f"{shard.file}: subject {entry.subject}: {error}") from None
    _check_places(shard)


def _check_entry(entry: SubjectEntry, index: ShardIndex) -> None:
    allowed = allowed_members(index)
    for suffix in entry.members:
        if suffix not in allowed:
            raise ValueError(f"has member {suffix}; a shard set holds .npy and .json members only, extra ones as declared")
        if len(f"{entry.subject}.{suffix}") > NAME_LIMIT_BYTES:
            raise ValueError(f"{suffix}: the member's name is longer than {NAME_LIMIT_BYTES} characters")
    named = {*entry.sequences, *entry.fingerprint, *entry.ranges}
    if not named <= set(index.sequences) or len(set(entry.sequences)) < len(entry.sequences) or not entry.sequences:
        raise ValueError("its sequences are none, not the set's, or there twice")
    numbers = [*entry.label_volume_ml.values(), *(bound for pair in entry.ranges.values() for bound in pair)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a range or a label volume is not finite")
    for name, text in entry.fingerprint.items():
        _check_fingerprint(name, text)
    _check_sizes(entry, len(index.sequences))
    if index.classification is not None:
        _check_views(entry, index.classification)


def _check_fingerprint(name: str, text: str) -> None:
    try:
        size = len(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        size = -1
    if size != FINGERPRINT_BYTES:
        raise ValueError(f"the fingerprint of {name} is not {FINGERPRINT_BYTES} bytes in base64")


def _check_sizes(entry: SubjectEntry, channels: int) -> None:
    """Where the index gives a shape, the arrays' sizes follow from it."""
    if entry.shape is None:
        return
    if not all(0 < length <= AXIS_LIMIT for length in entry.shape):
        raise ValueError(f"shape {entry.shape} is not one of a volume")
    voxels = math.prod(entry.shape)
    for suffix, voxel_bytes in VOXEL_BYTES.items():
        _check_size(entry, suffix, voxels * voxel_bytes * (channels if suffix == IMAGE else 1), entry.shape)


def _check_views(entry: SubjectEntry, facts: Classification) -> None:
    """A view's member is there where the view is, and has the size that its shape needs."""
    if {META, *map(view_member, entry.sequences)} != set(entry.members):
        raise ValueError(f"has members {', '.join(sorted(entry.members))} and views {', '.join(entry.sequences)}, which do not fit")
    for name in entry.sequences:
        _check_size(entry, view_member(name), 2 * math.prod(facts.views[name]), facts.views[name])


def _check_size(entry: SubjectEntry, suffix: str, expected: int, shape: tuple[int, ...]) -> None:
    """An `.npy` header takes at most one KiB."""
    if suffix in entry.members and not expected < entry.members[suffix][1] <= expected + 1024:
        raise ValueError(f"{suffix} has {entry.members[suffix][1]} bytes, which does not fit shape {shape}")


def _check_places(shard: ShardEntry) -> None:
    """Every member lies, with its header, inside the tar, and no two overlap."""
    free = 0
    for offset, size, name in sorted(_places(shard)):
        if size <= 0 or offset < BLOCK_BYTES or offset % BLOCK_BYTES or offset + size > shard.bytes:
            raise ValueError(f"{shard.file}: {name} at {offset}, {size} bytes, is no place in a tar of {shard.bytes} bytes")
        if offset - BLOCK_BYTES < free:
            raise ValueError(f"{shard.file}: {name} at {offset} overlaps the member before it")
        free = padded(offset + size)


def _places(shard: ShardEntry) -> Iterator[tuple[int, int, str]]:
    for entry in shard.subjects:
        for suffix, (offset, size) in entry.members.items():
            yield offset, size, f"{entry.subject}.{suffix}"


def _once(what: str, names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"lists {what} {name[:200]} twice")


def _plain(form: re.Pattern, name: str, what: str) -> None:
    if not form.fullmatch(name):
        raise ValueError(f"lists {name[:200]!r}, which is not a {what}")
