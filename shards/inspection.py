"""A shard set at a glance: a table of its subjects and a montage of their slices."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from mstkd.shards.layout import read_set
from mstkd.shards.members import read_member
from mstkd.shards.spec import (
    BRAIN, IMAGE, LABEL, META, LabelScheme, ShardIndex, Splits, SubjectMeta, ViewMeta, view_member,
)  # fmt: skip

REGION_COLOURS = {"WT": "#2ca02c", "TC": "#f2d21b", "ET": "#e02020"}  # of the value each leaves when painted
DISPLAY_RANGE = (-2.0, 3.0)  # z-scores shown black and white


def table(folder: Path) -> Table:
    """One row per subject: key, patient, stored shape, spacing, sequences, label volumes, where the splits put it; of views their class."""
    folder, index, splits = _read(folder)
    if index.classification is not None:
        return _table_of_views(folder, index, splits)
    regions = list(index.scheme.regions) if index.scheme else []
    view = Table(title=f"{folder}: {index.dataset}, {len(index.subjects())} subjects in {len(index.shards)} tars")
    for column in ("subject", "patient", "shape", "spacing (mm)", "sequences", *(f"{region} (ml)" for region in regions), "split"):
        view.add_column(column)
    for shard in index.shards:
        for entry in shard.subjects:
            meta = SubjectMeta.model_validate(read_member(folder / shard.file, entry, META))
            volumes = (f"{entry.label_volume_ml[region]:.1f}" if entry.label_volume_ml else "-" for region in regions)
            view.add_row(
                entry.subject,
                entry.patient,
                " x ".join(str(stop - start) for start, stop in meta.crop_box),
                " x ".join(f"{length:.2f}" for length in meta.spacing_mm),
                " ".join(entry.sequences),
                *volumes,
                _place(entry.subject, splits),
            )
    return view


def montage(folder: Path, out_png: Path, subjects: int = 4) -> Path:
    """A PNG of the first `subjects`: a column per sequence and one with the label painted over the first sequence.

    Axial slice with the largest labelled area, in radiological display (the patient's left is on the right). Of a set
    for classification a column per view.
    """
    folder, index, _ = _read(folder)
    if index.classification is not None:
        return _montage_of_views(folder, index, Path(out_png), subjects)
    places = [(folder / shard.file, entry) for shard in index.shards for entry in shard.subjects][:subjects]
    columns = len(index.sequences) + 1
    figure = Figure(figsize=(2.2 * columns, 2.5 * len(places)), layout="constrained", facecolor="black")
    panels = figure.subplots(len(places), columns, squeeze=False)
    scheme = index.scheme
    for row, (tar, entry) in zip(panels, places):
        image, brain = read_member(tar, entry, IMAGE), read_member(tar, entry, BRAIN)
        label = read_member(tar, entry, LABEL) if LABEL in entry.members else np.zeros(image.shape[1:], np.uint8)
        spacing_mm = SubjectMeta.model_validate(read_member(tar, entry, META)).spacing_mm
        area = (label > 0).sum(axis=(0, 1))
        k = int(area.argmax()) if area.any() else image.shape[3] // 2
        shown = next(channel for channel, name in enumerate(index.sequences) if name in entry.sequences)
        for channel, name in enumerate(index.sequences):
            _show(row[channel], image[channel, :, :, k], brain[:, :, k], spacing_mm, name if name in entry.sequences else f"{name}: absent")
        _show(row[-1], image[shown, :, :, k], brain[:, :, k], spacing_mm, "label")
        if scheme:
            row[-1].imshow(_radiological(_painted(label[:, :, k], scheme)), origin="lower", aspect=spacing_mm[1] / spacing_mm[0])
        row[0].text(0.02, 0.02, entry.subject, color="white", fontsize=7, transform=row[0].transAxes)
    figure.savefig(out_png, dpi=150)
    return Path(out_png)


def _table_of_views(folder: Path, index: ShardIndex, splits: Splits) -> Table:
    view = Table(title=f"{folder}: {index.dataset}, {len(index.subjects())} subjects in {len(index.shards)} tars")
    for column in ("subject", "patient", "class", "views", "split"):
        view.add_column(column)
    for shard in index.shards:
        for entry in shard.subjects:
            meta = ViewMeta.model_validate(read_member(folder / shard.file, entry, META))
            view.add_row(entry.subject, entry.patient, meta.label, " ".join(entry.sequences), _place(entry.subject, splits))
    return view


def _montage_of_views(folder: Path, index: ShardIndex, out_png: Path, subjects: int) -> Path:
    places = [(folder / shard.file, entry) for shard in index.shards for entry in shard.subjects][:subjects]
    figure = Figure(figsize=(2.6 * len(index.sequences), 2.3 * len(places)), layout="constrained")
    for row, (tar, entry) in zip(figure.subplots(len(places), len(index.sequences), squeeze=False), places, strict=True):
        label = ViewMeta.model_validate(read_member(tar, entry, META)).label
        for axes, name in zip(row, index.sequences, strict=True):
            axes.set_title(f"{name} of class {label}" if name in entry.sequences else f"{name}: absent", fontsize=9)
            axes.set(xticks=[], yticks=[])
            if name in entry.sequences:
                _show_view(axes, read_member(tar, entry, view_member(name)).astype(np.float32))
        row[0].set_ylabel(entry.subject, fontsize=7)
    figure.savefig(out_png, dpi=150)
    return out_png


def _show_view(axes, array: np.ndarray) -> None:
    """A vector as a line, an image in grey, of several channels the first."""
    if array.ndim == 1:
        axes.plot(array, linewidth=0.8)
    else:
        axes.imshow(array if array.ndim == 2 else array[0], cmap="gray")


def _read(folder: Path) -> tuple[Path, ShardIndex, Splits]:
    return Path(folder), *read_set(Path(folder))


def _place(subject: str, splits: Splits) -> str:
    """E.g. "test", "val 2" (validation of fold 2, training of the others) or "-"."""
    places = ["test"] if subject in splits.test else []
    places += [f"{part} {number}" for number, fold in enumerate(splits.folds) for part in ("val", "test") if subject in getattr(fold, part)]
    if not places and any(subject in fold.train for fold in splits.folds):
        places = ["train"]
    return ", ".join(places) or "-"


def _radiological(plane: np.ndarray) -> np.ndarray:
    """(X, Y, ...) RAS+ -> (rows, columns, ...) for origin="lower": anterior up, the patient's left on the right."""
    return np.swapaxes(plane[::-1], 0, 1)


def _show(axes, plane: np.ndarray, brain: np.ndarray, spacing_mm: tuple[float, float, float], title: str) -> None:
    low, high = DISPLAY_RANGE
    shown = np.where(brain, plane.astype(np.float32), low)  # background is 0, mid-grey as a z-score
    axes.imshow(_radiological(shown), cmap="gray", vmin=low, vmax=high, origin="lower", aspect=spacing_mm[1] / spacing_mm[0])
    axes.set_title(title, color="white", fontsize=9)
    for x, side in ((0.02, "R"), (0.93, "L")):
        axes.text(x, 0.9, side, color="white", fontsize=7, transform=axes.transAxes)
    axes.axis("off")


def _painted(plane: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """(X, Y, 4) RGBA of a label slice: oedema green, core yellow, enhancing red; other values from a qualitative map."""
    named = {value: REGION_COLOURS[region] for region, value in scheme.paint.items() if region in REGION_COLOURS}
    others = matplotlib.colormaps["tab20"]
    rgba = np.zeros((*plane.shape, 4))
    for value in scheme.values[1:]:
        colour = named.get(value) or others(value % others.N)
        rgba[plane == value] = matplotlib.colors.to_rgba(colour, alpha=0.6)
    return rgba
