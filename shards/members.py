"""The members of a tar: encoding, and the one bounded decoder (plain arrays and JSON; nothing is unpickled)."""

import io
import json
import math
import os
import tokenize
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy

from mstkd.errors import UserError
from mstkd.shards.spec import SubjectEntry, SubjectMeta, ViewMeta

JSON_LIMIT_BYTES = 2**20
NPY_HEADER_LIMIT_BYTES = 1024
GRID_LIMIT_VOXELS = 2**30  # of a file that was read; predictions are made on it
HEADER_ERRORS = (ValueError, TypeError, KeyError, SyntaxError, OverflowError, tokenize.TokenError, RecursionError, MemoryError)


def encode_array(array: np.ndarray) -> bytes:
    """The `.npy` bytes of an array."""
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
    return b"".join((header.getvalue(), array.data))  # np.save copies the voxels several times


def decode_member(suffix: str, payload: bytes | memoryview) -> Any:
    """A read-only array (`.npy`) or plain data (`.json`) from a member's bytes; ValueError for anything else."""
    if suffix.endswith(".npy"):
        return decode_array(payload)
    if suffix.endswith(".json"):
        return decode_json(payload)
    raise ValueError("only .npy and .json members are read")


def decode_array(payload: bytes | memoryview) -> np.ndarray:
    """A read-only view of an `.npy` payload, nothing being copied.

    ValueError unless it is an array of numbers in C order whose shape accounts for every byte: what a header claims
    is compared with the bytes there are before anything is made of it.
    """
    stream = io.BytesIO(bytes(payload[:NPY_HEADER_LIMIT_BYTES]))
    shape, fortran_order, dtype = _array_header(stream)
    if dtype.kind not in "biuf" or dtype.shape or fortran_order:
        raise ValueError(f"npy holds {str(dtype)[:40]}{' in Fortran order' if fortran_order else ''}; expected numbers in C order")
    if not all(type(length) is int and length > 0 for length in shape):
        raise ValueError("npy has a shape that is not made of counts")
    claimed, there = math.prod(shape) * dtype.itemsize, len(payload) - stream.tell()
    if claimed != there:
        raise ValueError(f"npy claims {_short(claimed)} bytes of values, {there} are there")
    return np.frombuffer(payload, dtype, offset=stream.tell()).reshape(shape)


def decode_json(payload: bytes | memoryview) -> Any:
    """Plain data from JSON of up to 1 MiB; ValueError if it is larger, nested beyond reason, or holds NaN or Infinity."""
    if len(payload) > JSON_LIMIT_BYTES:
        raise ValueError(f"{len(payload)} bytes of JSON; at most {JSON_LIMIT_BYTES} are read")
    try:
        return json.loads(bytes(payload), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def decode_meta(payload: bytes | memoryview) -> SubjectMeta:
    """A subject's meta data. ValueError names the first field that is wrong; grids too large to allocate are refused."""
    meta = SubjectMeta.model_validate(decode_json(payload))  # pydantic's error is a ValueError
    for grid in (meta.original_shape, meta.grid_shape or (1,)):
        if min(grid) < 1 or math.prod(grid) > GRID_LIMIT_VOXELS:
            raise ValueError(f"a grid of {' x '.join(map(_short, grid))} voxels; at most {GRID_LIMIT_VOXELS} in all")
    if any(not 0 <= start < stop <= 2**16 for start, stop in meta.crop_box):
        raise ValueError("crop_box is no box of voxels")
    return meta


def decode_view_meta(payload: bytes | memoryview) -> ViewMeta:
    """As `decode_meta`, in a set for classification."""
    return ViewMeta.model_validate(decode_json(payload))


def read_member(tar: Path, entry: SubjectEntry, suffix: str) -> Any:
    """One decoded member of a subject, read at its offset in `tar`; UserError if it does not decode."""
    try:
        return decode_member(suffix, read_payload(tar, *entry.members[suffix]))
    except ValueError as error:
        raise UserError(f"{tar}: subject {entry.subject}: {suffix} cannot be decoded ({error}); rebuild or copy the set again") from None


def read_payload(tar: Path, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`; ValueError, before anything is allocated, if the tar does not have them."""
    with tar.open("rb") as stream:
        if offset < 0 or size <= 0 or offset + size > os.fstat(stream.fileno()).st_size:
            raise ValueError(f"{_short(size)} bytes at {_short(offset)} are not in the tar")
        stream.seek(offset)
        return stream.read(size)


def _array_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
        return read(stream, max_header_size=NPY_HEADER_LIMIT_BYTES)
    except HEADER_ERRORS:  # numpy's own words quote the header, which may hold anything
        raise ValueError("not an npy array: its header cannot be read") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON holds {name}")


def _short(number: int) -> str:
    """A number for a message; one with thousands of digits would fill the screen."""
    return str(number) if abs(number) < 10**15 else "10^15 or more"
