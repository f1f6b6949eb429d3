"""Pictures of an evaluation. Slices are shown in radiological convention: the patient's right is on the left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mstkd.shards.inspection import REGION_COLOURS
from mstkd.shards.spec import LabelScheme

WINDOW = (1, 99.5)  # percentiles of a picture's values shown black and white
OPACITY = 0.6


@dataclass(frozen=True)
class CasePicture:
    """A case to show; volumes (X, Y, Z) RAS+."""

    title: str
    images: dict[str, NDArray]  # by sequence, in the data set's order, any units; their smallest value outside the brain
    truth: NDArray[np.uint8]  # in `truth_scheme`
    truth_scheme: LabelScheme
    predictions: dict[str, NDArray[np.uint8]]  # by subset name, in `scheme`
    scheme: LabelScheme
    spacing_mm: tuple[float, float, float]

    @property
    def background(self) -> NDArray:
        """What figures of one sequence show: the first."""
        return next(iter(self.images.values()))


def heat_map(summary: dict[str, Any], title: str, path: Path, key: str = "dice", label: str = "Dice %") -> None:
    """A fraction of the summary in per cent, one row per subset (and their mean), one column per region; empty where there was no case."""
    regions = list(summary["mean"])
    rows = {**summary["subsets"], "mean": summary["mean"]}
    values = 100 * np.array([[cells[region][key] for region in regions] for cells in rows.values()], dtype=float)
    figure = Figure(figsize=(2.6 + 0.9 * len(regions), 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(regions)), regions)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.axhline(len(rows) - 1.5, color="white", linewidth=2)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, "" if np.isnan(value) else f"{value:.1f}", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=label, shrink=0.6)
    figure.savefig(path, dpi=130)


def confusion_matrices(counts: dict[str, NDArray[np.int64]], classes: Sequence[str], path: Path) -> None:
    """One panel per subset: (K, K) cases by true class (rows) and decided class, shaded by their share of the row."""
    columns = min(len(counts), 4)
    rows = -(-len(counts) // columns)
    side = 1.2 + 0.3 * len(classes)
    figure = Figure(figsize=(columns * side, rows * (side + 0.3)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, cases) in zip(panels, counts.items(), strict=False):
        share = cases / np.maximum(cases.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(cases):
            if count:
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color="white" if share[row, column] > 0.5 else "black")
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(title=name, xlabel="decided", ylabel="true")
    for axes in list(panels)[len(counts) :]:
        axes.axis("off")
    figure.savefig(path, dpi=130)


def montage(cases: Sequence[CasePicture], subset: str, path: Path) -> None:
    """Rows: cases. Columns: truth and the prediction from `subset` in an axial, a coronal and a sagittal slice."""
    figure = Figure(figsize=(13, 2.6 * len(cases)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(cases), 6, squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        for axis, name in ((2, "axial"), (1, "coronal"), (0, "sagittal")):
            pair = row[2 * (2 - axis) : 2 * (2 - axis) + 2]
            position = _fullest_slice(case, axis)
            _draw(pair[0], case, case.truth, case.truth_scheme, axis, position)
            _draw(pair[1], case, case.predictions[subset], case.scheme, axis, position)
            pair[0].set_title(f"{name}: truth", fontsize=9)
            pair[1].set_title(f"{name}: predicted", fontsize=9)
        row[0].set_ylabel(case.title, fontsize=9)
    _legend(figure, cases[0].scheme)
    figure.savefig(path, dpi=110)


def qualitative(cases: Sequence[CasePicture], path: Path) -> None:
    """Rows: cases. Columns: the prediction from each of the cases' subsets, and the truth; one axial slice."""
    subsets = list(cases[0].predictions)
    columns = len(subsets) + 1
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(cases)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(cases), columns, squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        position = _fullest_slice(case, 2)
        for axes, name in zip(row, subsets):
            _draw(axes, case, case.predictions[name], case.scheme, 2, position)
            axes.set_title(name, fontsize=9)
        _draw(row[-1], case, case.truth, case.truth_scheme, 2, position)
        row[-1].set_title("truth", fontsize=9)
        row[0].set_ylabel(case.title, fontsize=9)
    _legend(figure, cases[0].scheme)
    figure.savefig(path, dpi=110)


def colours(scheme: LabelScheme) -> dict[str, tuple[int, str]]:
    """Region -> (label value it leaves when painted, colour)."""
    table = matplotlib.colormaps["tab20"]
    return {
        region: (value, REGION_COLOURS.get(region, matplotlib.colors.to_hex(table(number % 20))))
        for number, (region, value) in enumerate(scheme.paint.items())
    }


def _fullest_slice(case: CasePicture, axis: int) -> int:
    """Where the truth is largest; without any, where the most brain is seen."""
    others = tuple(other for other in range(3) if other != axis)
    shown = case.truth if case.truth.any() else case.background != case.background.flat[0]
    return int(np.count_nonzero(shown, axis=others).argmax())


def _draw(axes, case: CasePicture, labels: NDArray[np.uint8], scheme: LabelScheme, axis: int, position: int) -> None:
    picture = oriented(case.background, axis, position).astype(np.float32)
    low, high = np.percentile(picture, WINDOW)
    plane = [n for n in range(3) if n != axis]
    aspect = case.spacing_mm[plane[1]] / case.spacing_mm[plane[0]]
    axes.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
    flat = oriented(labels, axis, position)
    overlay = np.zeros((*flat.shape, 4))
    for value, colour in colours(scheme).values():
        overlay[flat == value] = to_rgba(colour, OPACITY)
    axes.imshow(overlay, origin="lower", aspect=aspect, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def oriented(volume: NDArray, axis: int, position: int) -> NDArray:
    """A slice with rows upwards: superior or anterior up; patient's right, or in sagittal slices anterior, on the left."""
    return np.take(volume, position, axis=axis)[::-1].T


def _legend(figure: Figure, scheme: LabelScheme) -> None:
    named = colours(scheme)
    if set(named) == set(REGION_COLOURS):
        words = {"WT": "oedema", "TC": "core", "ET": "enhancing"}
        handles = [matplotlib.patches.Patch(color=colour, label=f"{words[region]} ({value})") for region, (value, colour) in named.items()]
    else:
        handles = [matplotlib.patches.Patch(color=colour, label=region) for region, (_, colour) in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), fontsize=9, frameon=False)
