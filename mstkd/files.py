"""Files and folders: those written here appear complete or not at all, whoever is killed or reads meanwhile."""

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".tmp"  # ends the name of what a killed process leaves


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes are at `path`, on the disk, when the block ends; if it fails, `path` is as it was."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends; if it fails, nothing is there."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def create_file(path: Path, data: bytes, mode: int = 0o666) -> bool:
    """Write a file whole unless it exists; several processes may try at once. Whether it was written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.link(temporary, path)  # unlike a rename it never replaces
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: whole unless two processes come at once
        if path.exists():
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As UTF-8."""
    with whole_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Indented; a NaN would be a mistake and raises ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """`columns` are the first line; None is an empty field."""
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, lines.getvalue())


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = Path(path).resolve()
    return path if path.is_dir() else existing_folder(path.parent)


def size_text(size_bytes: float) -> str:
    """Bytes for people, in three digits, e.g. "3.21 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.3g} TiB"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
