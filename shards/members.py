"""The members of a tar: encoding, and decoding by an allow-list (plain arrays and JSON; nothing is unpickled)."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from mstkd.errors import UserError
from mstkd.shards.spec import SubjectEntry


def encode_array(array: np.ndarray) -> bytes:
    """The `.npy` bytes of an array."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def decode_member(suffix: str, payload: bytes) -> Any:
    """An array (`.npy`, no objects) or plain data (`.json`); ValueError for anything else."""
    if suffix.endswith(".npy"):
        try:
            return np.load(io.BytesIO(payload), allow_pickle=False)
        except EOFError:
            raise ValueError("empty") from None
    if suffix.endswith(".json"):
        return json.loads(payload)
    raise ValueError("only .npy and .json members are read")


def read_member(tar: Path, entry: SubjectEntry, suffix: str) -> Any:
    """One decoded member of a subject, read at its offset in `tar`; UserError if it does not decode."""
    offset, size = entry.members[suffix]
    with tar.open("rb") as stream:
        stream.seek(offset)
        payload = stream.read(size)
    try:
        if len(payload) < size:
            raise ValueError(f"{len(payload)} of {size} bytes")
        return decode_member(suffix, payload)
    except ValueError as error:
        raise UserError(f"{tar}: subject {entry.subject}: {suffix} cannot be decoded ({error}); rebuild or copy the set again") from None
