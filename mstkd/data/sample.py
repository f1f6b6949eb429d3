"""What flows from a shard set to a batch: items of the stream, subjects, and the draws that belong to them.

Letters: M sequences (in the data set's order), X Y Z voxels (RAS+).
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from mstkd.shards.spec import SubjectMeta, ViewMeta


@dataclass(frozen=True)
class Item:
    """One position's content: a subject of a shard set, or in 2D a slice of one, its `repeat`-th appearance in `epoch`."""

    epoch: int
    source: int  # index into data.shards
    subject: str
    repeat: int = 0
    slice_index: int | None = None  # k of [..., k]; None: the volume


@dataclass
class Sample:
    """A subject, or a crop of one. As stored, `image` is float16, z-scored over the brain and 0 outside it."""

    image: np.ndarray  # (M, X, Y, Z)
    brain: np.ndarray  # (X, Y, Z) uint8
    label: np.ndarray | None  # (X, Y, Z) uint8 in the declared scheme
    meta: SubjectMeta


@dataclass
class ViewSample:
    """A subject of a set for classification."""

    views: dict[str, np.ndarray]  # those that there are: name -> float16, z-scored, of the shape that the index gives
    label: int  # index into the set's classes
    meta: ViewMeta


def rng(*key: int | str) -> np.random.Generator:
    """The generator that belongs to `key`: the same in every process, whatever was drawn before."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def item_rng(seed: int, item: Item, purpose: str) -> np.random.Generator:
    """The generator of one kind of draw for one item."""
    place = () if item.slice_index is None else (item.slice_index,)  # volumes keep the key they had before there were slices
    return rng(seed, item.epoch, item.source, item.subject, item.repeat, purpose, *place)
