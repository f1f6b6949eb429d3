"""The contract of a shard set: label schemes, index, subject meta data, splits.

Everything here is plain data (pydantic); readers and writers import it, it imports none of them.
"""

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

FORMAT_VERSION = 1
IMAGE, BRAIN, LABEL, META = "image.npy", "brain.npy", "label.npy", "meta.json"  # members of a subject, in this order
FILE_LABEL = "file_label.npy"  # an extra member of resampled subjects: the label on the grid and in the axes of its file
CLAHE = "clahe.npy"  # an extra member where the data set asks for it: the image equalised, see mstkd/shards/clahe.py
KEY_LIMIT = 80  # characters: a tar has 100 for a whole member name
SUBJECT_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_LIMIT}}}")  # no dots: WebDataset cuts keys at the first one


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelScheme(Strict):
    """Which voxel values exist and which unions of them are scored.

    `regions` maps a region to its label values, in the order in which overlapping regions are painted;
    `paint` gives the value a painted region leaves behind. For tissue schemes each class is a region of its own.
    """

    name: str
    values: tuple[int, ...]  # all values a label map may hold, 0 included
    regions: dict[str, tuple[int, ...]]
    paint: dict[str, int]

    @property
    def sided(self) -> bool:
        """Whether it tells left from right: two regions whose names differ in left_ and right_."""
        return any(name.startswith("left_") and f"right_{name.removeprefix('left_')}" in self.regions for name in self.regions)

    def around(self, region: str) -> int:
        """The value of what a region lies in: the smallest other one that holds all of it, or background."""
        holding = [other for other, values in self.regions.items() if set(values) > set(self.regions[region])]
        return self.paint[min(holding, key=lambda other: len(self.regions[other]))] if holding else 0


def _tumour(name: str, core: int, oedema: int, enhancing: int, extra: tuple[int, ...] = ()) -> LabelScheme:
    return LabelScheme(
        name=name,
        values=tuple(sorted({0, core, oedema, enhancing, *extra})),
        regions={"WT": (core, oedema, enhancing), "TC": (core, enhancing), "ET": (enhancing,)},
        paint={"WT": oedema, "TC": core, "ET": enhancing},
    )


def _classes(name: str, classes: dict[str, int]) -> LabelScheme:
    return LabelScheme(name=name, values=(0, *classes.values()), regions={k: (v,) for k, v in classes.items()}, paint=classes)


_ONE_SIDE = ("lateral_ventricle", "cerebellar_WM", "cerebellar_cortex", "thalamus", "caudate", "putamen", "pallidum")
_ONE_SIDE_DEEP = ("hippocampus", "amygdala", "ventral_DC")
MALC27 = (  # in the order of their values, 1 to 27
    "left_WM", "left_GM", "right_WM", "right_GM",
    *(f"left_{name}" for name in _ONE_SIDE), "third_ventricle", "fourth_ventricle", "brain_stem",
    *(f"left_{name}" for name in _ONE_SIDE_DEEP),
    *(f"right_{name}" for name in (*_ONE_SIDE, *_ONE_SIDE_DEEP)),
)  # fmt: skip

LABEL_SCHEMES: dict[str, LabelScheme] = {
    scheme.name: scheme
    for scheme in (
        _tumour("brats2018", core=1, oedema=2, enhancing=4),
        _tumour("brats2023", core=1, oedema=2, enhancing=3),
        _tumour("brats2024", core=1, oedema=2, enhancing=3, extra=(4,)),  # 4 = resection cavity, outside every region
        _tumour("msd_task01", core=2, oedema=1, enhancing=3),
        _classes("tissue3", {"CSF": 1, "GM": 2, "WM": 3}),
        _classes("malc27", {name: value for value, name in enumerate(MALC27, 1)}),
    )
}


def view_member(view: str) -> str:
    """The suffix of the member that holds a view, float16, z-scored over its own values."""
    return f"{view}.npy"


def scheme_of(declared: "str | LabelScheme | None") -> "LabelScheme | None":
    """The label scheme that a spec or an index declares, by name or as a whole; None where there are no labels."""
    return LABEL_SCHEMES[declared] if isinstance(declared, str) else declared


class SequenceStats(Strict):
    """Raw intensities of one sequence over the brain; mean and std undo the z-score."""

    mean: float
    std: float
    min: float
    max: float
    p0_1: float
    p0_5: float
    p99_5: float
    p99_9: float


class SubjectMeta(Strict):
    """`<subject>.meta.json`: what is needed to normalise differently and to return to the original grid."""

    subject: str
    patient: str
    site: str | None = None
    field_strength_t: float | None = None
    sequences: tuple[str, ...]  # present ones, in the data set's order
    stats: dict[str, SequenceStats]  # per present sequence
    spacing_mm: tuple[float, float, float]  # of the stored volume: (X, Y, Z), RAS+
    brain_from: Literal["volumes", "mask"] = "volumes"  # union of what is not background, or a given mask
    constant: tuple[str, ...] = ()  # sequences whose file carries one value throughout; recorded as missing
    original_shape: tuple[int, int, int]  # of the file, before reorientation
    original_affine: tuple[tuple[float, float, float, float], ...]  # 4 x 4, voxel -> mm, of the file
    orientation: str  # axis codes of the file, e.g. "LPS"
    grid_shape: tuple[int, int, int] | None = None  # of the RAS+ grid after resampling; None: not resampled
    crop_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # (start, stop) per axis, in that RAS+ grid
    synthetic: tuple[str, ...] = ()  # those of `sequences` that a network made; their raw scale is its own, 0 to 1

    @model_serializer(mode="wrap")
    def _measured_as_ever(self, write: SerializerFunctionWrapHandler) -> dict:
        """A subject without synthetic sequences has the same bytes as before there were any."""
        return _without_empty(write(self), "synthetic")

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """(X, Y, Z) of the RAS+ grid in which `crop_box` lies: the file's own, or the one it was resampled to."""
        if self.grid_shape is not None:
            return self.grid_shape
        length = dict(zip(self.orientation, self.original_shape, strict=True))
        return tuple(length[code] if code in length else length[opposite] for code, opposite in ("RL", "AP", "SI"))


class Classification(Strict):
    """What a set for classification holds instead of volumes: views of a subject, which may be of different kinds, and its class."""

    views: dict[str, tuple[int, ...]]  # name -> shape of its array; the names are those in `sequences`, in that order
    classes: tuple[str, ...]


class ViewStats(Strict):
    """Raw values of one view; mean and std undo the z-score."""

    mean: float
    std: float


class ViewMeta(Strict):
    """`<subject>.meta.json` in a set for classification."""

    subject: str
    patient: str
    sequences: tuple[str, ...]  # the views that there are, in the set's order
    label: str  # one of the set's classes
    stats: dict[str, ViewStats]  # per view that there is


class SubjectEntry(Strict):
    """One subject in the index. `members` maps suffix (e.g. "image.npy") to (byte offset of the payload, byte size)."""

    subject: str
    patient: str
    sequences: tuple[str, ...]
    members: dict[str, tuple[int, int]]
    shape: tuple[int, int, int] | None = None  # (X, Y, Z) of every volume of the subject; None: not said
    ranges: dict[str, tuple[float, float]] = {}  # per sequence: smallest and largest stored value (z-score, float16)
    fingerprint: dict[str, str]  # per sequence: base64 of float16 16^3 block means of the z-scored volume
    label_volume_ml: dict[str, float] = Field(default_factory=dict)  # per region of the scheme
    synthetic: tuple[str, ...] = ()  # as in SubjectMeta

    @model_serializer(mode="wrap")
    def _measured_as_ever(self, write: SerializerFunctionWrapHandler) -> dict:
        return _without_empty(write(self), "synthetic")

    @property
    def measured(self) -> tuple[str, ...]:
        """The sequences that came from a scanner."""
        return tuple(name for name in self.sequences if name not in self.synthetic)


class ShardEntry(Strict):
    file: str
    bytes: int
    sha256: str
    subjects: tuple[SubjectEntry, ...]


class ShardIndex(Strict):
    """`index.json`."""

    version: Literal[1] = FORMAT_VERSION
    dataset: str
    spec_sha256: str
    sequences: tuple[str, ...]
    label_scheme: str | LabelScheme | None  # a known name, or the whole scheme of a user's own data set
    extra_members: tuple[str, ...] = ()
    classification: Classification | None = None  # of a set of views; None: of volumes
    shards: tuple[ShardEntry, ...]

    @model_serializer(mode="wrap")
    def _volumes_as_ever(self, write: SerializerFunctionWrapHandler) -> dict:
        """A set of volumes has the same index.json, and so the same digest, as before there were views."""
        return _without_empty(write(self), "classification")

    @property
    def scheme(self) -> LabelScheme | None:
        """The label scheme, None where the set has no labels."""
        return scheme_of(self.label_scheme)

    def subjects(self) -> dict[str, SubjectEntry]:
        """All subjects by key, in stored order."""
        return {entry.subject: entry for shard in self.shards for entry in shard.subjects}


class Fold(Strict):
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...] = ()  # of this fold alone, beside the set's: who is left out of it

    @model_serializer(mode="wrap")
    def _as_ever(self, write: SerializerFunctionWrapHandler) -> dict:
        """A fold with nobody of its own to test on has the same bytes as before there were any."""
        return _without_empty(write(self), "test")


class Splits(Strict):
    """`splits.json`: subject keys; all subjects of a patient on one side, unless `allow_overlap` says otherwise."""

    version: Literal[1] = 1
    folds: tuple[Fold, ...]
    test: tuple[str, ...] = ()
    allow_overlap: bool = False  # stated by whoever made an explicit split; reports print it


def _without_empty(values: dict, key: str) -> dict:
    """What is written, without a key that says nothing."""
    return {name: value for name, value in values.items() if name != key or value}


def read_index(folder: Path) -> ShardIndex:
    """The index of a shard set."""
    return ShardIndex.model_validate(json.loads((Path(folder) / "index.json").read_text()))


def read_splits(folder: Path) -> Splits:
    """The splits of a shard set."""
    return Splits.model_validate(json.loads((Path(folder) / "splits.json").read_text()))
