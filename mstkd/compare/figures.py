"""Pictures of a comparison. No patient is named or can be told apart by more than a score."""

import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mstkd.compare.result import MEAN, Comparison

LEAST_LIMIT = 1.0  # percentage points at which the colours end, at least: noise should not look strong


def box_plots(values: Mapping[str, NDArray], regions: tuple[str, ...], path: Path) -> None:
    """Per region, a box per arm of its patients' mean Dice over subsets; `values`: arm -> (P, R), 0..1."""
    height = 1.4 + 0.36 * len(values)
    figure = Figure(figsize=(2.2 + 3.2 * len(regions), height), layout="constrained")
    colours = matplotlib.colormaps["tab10"]
    for axes, (r, region) in zip(figure.subplots(1, len(regions), sharey=True, squeeze=False)[0], enumerate(regions)):
        known = [100 * scores[np.isfinite(scores[:, r]), r] for scores in values.values()]
        boxes = axes.boxplot(
            known, orientation="horizontal", widths=0.6, patch_artist=True, showmeans=True,
            meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4}, flierprops={"markersize": 3},
            medianprops={"color": "black"},
        )  # fmt: skip
        for number, box in enumerate(boxes["boxes"]):
            box.set_facecolor((*colours(number % 10)[:3], 0.55))
        axes.set_title(region, fontsize=10)
        axes.set_xlabel("Dice %")
        axes.grid(axis="x", color="#e3e8ee")
        axes.set_axisbelow(True)
        axes.set_yticks(range(1, len(values) + 1), list(values))
    axes.invert_yaxis()  # shared: the first arm on top
    figure.savefig(path, dpi=130)


def difference_map(comparison: Comparison, arm: str, limit: float, path: Path) -> None:
    """Difference in Dice to the baseline in percentage points, a row per subset and their mean; colours end at +-`limit`."""
    rows = [*comparison.subsets, MEAN]
    values = np.array([[_difference(comparison, arm, subset, region) for region in comparison.regions] for subset in rows])
    figure = Figure(figsize=(2.9 + 0.95 * len(comparison.regions), 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="#e6e6e6")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(comparison.regions)), comparison.regions)
    axes.set_yticks(range(len(rows)), rows)
    axes.axhline(len(rows) - 1.5, color="black", linewidth=1)
    for (row, column), value in np.ndenumerate(values):
        strong = np.isfinite(value) and abs(value) > 0.6 * limit
        text = f"{value:+.1f}" if np.isfinite(value) else "-"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if strong else "black")
    axes.set_title(f"{arm}\nminus {comparison.baseline}", fontsize=10)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="Dice, percentage points (blue: better)", shrink=0.6)
    figure.savefig(path, dpi=130)


def draw(comparison: Comparison, values: Mapping[str, NDArray]) -> dict[str, Path]:
    """Write the PNG files into the comparison's folder; returns caption -> path."""
    drawn = {"Dice of the patients, each the mean over its subsets and the seeds (line: median, diamond: mean)": comparison.out / "box_plots.png"}
    box_plots(values, comparison.regions, comparison.out / "box_plots.png")
    differences = [abs(100 * cell.difference.value) for cell in comparison.cells.values() if cell.difference]
    limit = max([LEAST_LIMIT, *differences])
    for number, arm in enumerate((name for name in comparison.arms if name != comparison.baseline), 1):
        path = comparison.out / f"differences_{number}_{slug(arm)}.png"
        difference_map(comparison, arm, limit, path)
        drawn[f"{arm} minus {comparison.baseline}, by given sequences; the same colours in every such map"] = path
    return drawn


def slug(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60]


def _difference(comparison: Comparison, arm: str, subset: str, region: str) -> float:
    cell = comparison.cells.get((arm, subset, region))
    return 100 * cell.difference.value if cell and cell.difference else np.nan
