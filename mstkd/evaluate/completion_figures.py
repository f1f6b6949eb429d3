"""Pictures of completed sequences, and heat maps of their figures. Slices are shown in radiological convention."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mstkd.evaluate.completion import Completer
from mstkd.evaluate.figures import oriented
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.report import shown_subsets
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.synthesis import WHOLE, Box, Truth, psnr, whole_tumour
from mstkd.subsets import proper, subset_name

ERROR_END = 0.3  # of the error map's colours: the same in every picture, so that pictures can be compared
PANEL_IN = 1.7  # of a montage, inches


@dataclass(frozen=True)
class CompletionPicture:
    """One axial slice of a case, completed in several ways; images (S, S) in [0, 1]."""

    title: str
    truth: dict[str, NDArray[np.float32]]  # by sequence
    completed: dict[tuple[str, str], NDArray[np.float32]]  # by (given, target)
    tumour: Box | None  # where it is magnified
    aspect: float  # height of a pixel over its width


def completion_pictures(completer: Completer, network: str, source: CaseSource, chosen: dict[str, str]) -> list[CompletionPicture]:
    """The chosen cases, which must have every sequence, each in the slice that shows most of WT, or of the brain where there is none."""
    names, pictures = completer.sequences, []
    subsets = proper(shown_subsets(names, completer.method.subsets))
    with evaluation_mode(completer.method):
        for rank, subject in chosen.items():
            case = completer.slices(source.subject(subject))
            truth = Truth.of(completer, case, source)
            seen = [(int(tumour.sum()), int(brain.sum())) for tumour, brain in zip(whole_tumour(case, source), case.brain, strict=True)]
            shown = seen.index(max(seen))
            case = case.part(shown, shown + 1)
            completed = {}
            for subset in subsets:
                stack, given = completer.complete(network, case, subset)[0].numpy(), subset_name(names, subset)
                completed |= {(given, name): stack[m] for m, name in enumerate(names) if not subset[m]}
            images = dict(zip(names, truth.images[shown].numpy(), strict=True))
            spacing_mm = case.meta.spacing_mm
            title = rank  # no subject key: pictures go to MLflow
            pictures.append(CompletionPicture(title, images, completed, truth.local[shown], spacing_mm[1] / spacing_mm[0]))
    return pictures


def draw_completions(folder: Path, summaries: dict[str, dict[str, Any]], cases: Sequence[CompletionPicture], sequences: Sequence[str]) -> dict[str, Path]:
    """Write the PNG files; returns caption -> path."""
    drawn = {}
    for network, summary in summaries.items():
        path = folder / f"heat_map_{network}.png"
        heat_maps(summary, sequences, f"{network}{' (oracle)' * bool(summary.get('oracle'))}, by given sequences and target", path)
        drawn[f"PSNR and SSIM of the {network} by given sequences and target"] = path
    for case in cases:
        path = folder / f"completed_{case.title}.png"
        montage(case, path)
        drawn[f"{case.title.capitalize()} case: what is given, the true and the completed sequence, their absolute difference (patient's right on the left)"] = path
    return drawn


def heat_maps(summary: dict[str, Any], sequences: Sequence[str], title: str, path: Path) -> None:
    """PSNR and SSIM side by side: one row per set of given sequences, one column per target; empty where it was given."""
    given = list(dict.fromkeys(pattern.partition("->")[0] for pattern in summary["patterns"]))
    figure = Figure(figsize=(2.6 + 2 * 0.95 * len(sequences), 1.3 + 0.34 * len(given)), layout="constrained")
    for axes, (key, words, digits) in zip(figure.subplots(1, 2, sharey=True), (("psnr", "PSNR dB", 1), ("ssim", "SSIM", 3)), strict=True):
        cells = [[summary["patterns"].get(f"{names}->{target}", {}).get(key) for target in sequences] for names in given]
        values = np.array(cells, dtype=float)
        image = axes.imshow(values, cmap="viridis", aspect="auto")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=9, color="black" if value > middle else "white")
        axes.set_xticks(range(len(sequences)), sequences)
        axes.set_yticks(range(len(given)), given)
        axes.tick_params(length=0)
        axes.set_xlabel("target")
        figure.colorbar(image, ax=axes, label=words, shrink=0.8)
    figure.axes[0].set_ylabel("given")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def montage(case: CompletionPicture, path: Path) -> None:
    """Rows: patterns. Columns: given, target, completed and their absolute difference; beside them the same round the tumour, magnified."""
    parts = [WHOLE] if case.tumour is None else [WHOLE, _margin(case.tumour, next(iter(case.truth.values())).shape)]
    figure, grid, bar = _grid(len(case.completed), len(parts))
    for row, ((given, target), image) in zip(grid, case.completed.items(), strict=True):
        truth = case.truth[target]
        for number, part in enumerate(parts):
            panels = row[4 * number : 4 * number + 4]
            shown = [_mosaic([case.truth[name][part] for name in given.split("+")]), truth[part], image[part]]
            for axes, picture in zip(panels, shown, strict=False):
                _show(axes, picture, case.aspect, cmap="gray", vmin=0, vmax=1)
            errors = _show(panels[3], np.abs(image - truth)[part], case.aspect, cmap="inferno", vmin=0, vmax=ERROR_END)
        if len(parts) > 1:
            for axes in row["+" in given : 4]:  # in a mosaic of several there is no place for it
                _frame(axes, parts[1])
        row[0].set_ylabel(f"{given}\n-> {target}".replace("+", "+\n") if len(given) > 12 else f"{given} -> {target}", fontsize=8)
        row[2].text(0.03, 0.03, f"{psnr(image, truth):.1f} dB", color="white", fontsize=7, transform=row[2].transAxes)
    names = ["given", "target", "completed", "difference"]
    for axes, name in zip(grid[0], names if len(parts) == 1 else names + [f"{name}, magnified" for name in names], strict=True):
        axes.set_title(name, fontsize=9)
    figure.colorbar(errors, cax=bar, label="absolute difference", extend="max")
    figure.savefig(path, dpi=110)


def _grid(rows: int, groups: int) -> tuple[Figure, NDArray, Any]:
    """A figure, its panels (rows, 4 groups) in groups of four columns, and where the colour bar goes."""
    left, right, top, gap = 0.65, 0.85, 0.3, 0.12  # inches
    width, height = left + groups * (4 * PANEL_IN + gap) + right, top + rows * PANEL_IN + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    blocks = []
    for group in range(groups):
        start = left + group * (4 * PANEL_IN + gap)
        place = dict(left=start / width, right=(start + 4 * PANEL_IN) / width, bottom=0.1 / height, top=1 - top / height, wspace=0.02, hspace=0.02)
        blocks.append(figure.subplots(rows, 4, squeeze=False, gridspec_kw=place))
    tall = min(rows, 3) * PANEL_IN
    bar = figure.add_axes((1 - (right - 0.05) / width, 1 - (top + tall) / height, 0.15 / width, (tall - 0.1) / height))
    return figure, np.concatenate(blocks, axis=1), bar


def _show(axes, picture: NDArray, aspect: float, **how):
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(oriented(picture[..., None], 2, 0), origin="lower", aspect=aspect, interpolation="nearest", **how)


def _frame(axes, box: Box) -> None:
    """A red line through the outermost pixels of `box` (X, Y) in a picture shown by `_show`, whose first axis runs from right to left."""
    size = round(axes.get_xlim()[1] + 0.5)
    (left, right), (low, high) = ((side.start, side.stop) for side in box)
    axes.add_patch(Rectangle((size - right, low), right - left - 1, high - low - 1, fill=False, edgecolor="red", linewidth=1, zorder=3))


def _mosaic(images: Sequence[NDArray]) -> NDArray:
    """One image as it is; up to four, and more, in a square of them, the first one top left as shown."""
    side = int(np.ceil(np.sqrt(len(images))))
    if side == 1:
        return images[0]
    tiles = [*images, *[np.zeros_like(images[0])] * (side**2 - len(images))]
    # shown, the first axis runs from right to left and the second upwards
    return np.block([[tiles[side * row + column] for row in reversed(range(side))] for column in reversed(range(side))])


def _margin(box: Box, shape: tuple[int, int]) -> Box:
    """A square round `box` with some of what surrounds it, inside the image."""
    side = min(round(1.3 * max(s.stop - s.start for s in box)), *shape)
    starts = (min(max((s.start + s.stop - side) // 2, 0), size - side) for s, size in zip(box, shape, strict=True))
    return tuple(slice(start, start + side) for start in starts)
