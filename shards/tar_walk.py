"""The headers of a tar, read block by block: nothing a header claims is believed before it is checked.

`tarfile` reads extended headers of whatever size they claim and follows links; a shard needs neither.
"""

import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mstkd.shards.spec import SUBJECT_KEY

SUFFIX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.(npy|json)")  # the only kinds of member that are decoded
BLOCK_BYTES = 512
END_LIMIT_BYTES = 2**16  # writers pad the end with zeros to a record, 10 KiB as a rule
# a pax header as WebDataset's ShardWriter writes one before each member: when it was made, to the millionth of a second
TIMES = re.compile(rb"(\d{1,3} [amc]time=-?[0-9.]{1,40}\n){1,3}")
NAME_LIMIT_BYTES = 100  # of the plain header field; longer names need an extended header
KINDS = {
    tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a directory", tarfile.FIFOTYPE: "a pipe", tarfile.GNUTYPE_LONGNAME: "an extended (GNU) name",
    tarfile.GNUTYPE_LONGLINK: "an extended (GNU) name", tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.XHDTYPE: "an extended (pax) header", tarfile.XGLTYPE: "an extended (pax) header",
    tarfile.SOLARIS_XHDTYPE: "an extended (pax) header",
}  # fmt: skip


class Member(NamedTuple):
    """A plain file in a tar; `offset` and `size` are those of its payload, in bytes."""

    name: str
    offset: int
    size: int


def walk(tar: Path) -> Iterator[Member]:
    """The members of a tar, in stored order, from its headers alone.

    ValueError at the first thing that is not a plain file within the bytes of the tar, or if the end mark is missing. Of
    extended headers only those pass that hold times and nothing else; they are not members.
    Names are as stored: `split_name` checks them.
    """
    found = tar.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a plain file")  # opening a pipe waits for a writer, a device may never end
    total = found.st_size
    with tar.open("rb") as stream:
        place = 0
        while place < total:
            stream.seek(place)
            block = stream.read(BLOCK_BYTES)
            if not any(block):
                if total - place > END_LIMIT_BYTES or any(stream.read(END_LIMIT_BYTES)):
                    raise ValueError("bytes follow the end mark")
                return
            if _holds_times(block, stream):
                place += 2 * BLOCK_BYTES
                continue
            name, size = read_header(block)
            offset = place + BLOCK_BYTES
            if offset + size > total:
                raise ValueError(f"member {name!r} claims {size} bytes, {total - offset} follow")
            yield Member(name, offset, size)
            place = padded(offset + size)
    raise ValueError("cut off: the end mark is missing")


def read_header(block: bytes) -> tuple[str, int]:
    """(name, size in bytes) of a plain file from its header block; ValueError for anything else."""
    header = _parsed(block)
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError(f"member {header.name!r} is {KINDS.get(header.type, f'of type {header.type!r}')}, not a plain file")
    if header.size < 0 or header.linkname:
        raise ValueError(f"member {header.name!r} has a size below 0 or a link target")
    return header.name, header.size


def _parsed(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"not a tar header ({error})") from None


def _holds_times(block: bytes, stream: BinaryIO) -> bool:
    """Whether this is a pax header of one block, the next in `stream`, that says nothing but times."""
    header = _parsed(block)
    if header.type != tarfile.XHDTYPE or not 0 < header.size <= BLOCK_BYTES:
        return False
    return bool(TIMES.fullmatch(stream.read(BLOCK_BYTES)[: header.size]))


def split_name(name: str) -> tuple[str, str]:
    """(subject, suffix) of a member's name; ValueError unless both are plain: no separator, `..`, NUL or other character."""
    subject, _, suffix = name.partition(".")
    if not SUBJECT_KEY.fullmatch(subject) or not SUFFIX.fullmatch(suffix) or len(name) > NAME_LIMIT_BYTES:
        raise ValueError(f"member {name!r} does not belong in a shard set")
    return subject, suffix


def padded(end: int) -> int:
    """Where the next header begins after a payload that ends at `end`."""
    return -(-end // BLOCK_BYTES) * BLOCK_BYTES
