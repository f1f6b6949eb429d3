"""Pictures of a comparison. No patient is named or can be told apart by more than a score."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mstkd.compare.result import MEAN, Comparison
from mstkd.measures import Measure, Unit


def box_plots(values: Mapping[str, NDArray], measures: Sequence[Measure], path: Path) -> None:
    """Per measure, a box per arm of its patients' means over patterns; `values`: arm -> (P, R)."""
    height = 1.4 + 0.36 * len(values)
    figure = Figure(figsize=(2.2 + 3.2 * len(measures), height), layout="constrained")
    colours = matplotlib.colormaps["tab10"]
    for axes, (r, measure) in zip(figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], enumerate(measures)):
        known = [measure.unit.shown(scores[np.isfinite(scores[:, r]), r]) for scores in values.values()]
        boxes = axes.boxplot(
            known, orientation="horizontal", widths=0.6, patch_artist=True, showmeans=True,
            meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4}, flierprops={"markersize": 3},
            medianprops={"color": "black"},
        )  # fmt: skip
        for number, box in enumerate(boxes["boxes"]):
            box.set_facecolor((*colours(number % 10)[:3], 0.55))
        axes.set_title(measure.title, fontsize=10)
        axes.set_xlabel(measure.unit.heading)
        axes.grid(axis="x", color="#e3e8ee")
        axes.set_axisbelow(True)
        axes.set_yticks(range(1, len(values) + 1), list(values))
    axes.invert_yaxis()  # shared: the first arm on top
    figure.savefig(path, dpi=130)


def difference_map(comparison: Comparison, arm: str, limits: Mapping[Unit, float], path: Path) -> None:
    """Differences to the baseline, a row per pattern and their mean, a panel per unit; its colours end at +-`limits`."""
    rows, panels = [*comparison.patterns, MEAN], by_unit(comparison.measures)
    widths = [len(measures) for measures in panels.values()]
    size = (1.7 + 1.2 * len(panels) + 0.95 * sum(widths), max(1.4 + 0.32 * len(rows), 2.4))  # no lower than the words beside the colours
    figure = Figure(figsize=size, layout="constrained")
    for axes, (unit, measures) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0], panels.items()):
        values = np.array([[_difference(comparison, arm, pattern, measure) for measure in measures] for pattern in rows])
        colours = matplotlib.colormaps["RdBu" if unit.larger_is_better else "RdBu_r"].with_extremes(bad="#e6e6e6")
        image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-limits[unit], vmax=limits[unit], aspect="auto")
        axes.set_xticks(range(len(measures)), [measure.title for measure in measures])
        axes.set_yticks(range(len(rows)), rows)
        axes.axhline(len(rows) - 1.5, color="black", linewidth=1)
        for (row, column), value in np.ndenumerate(values):
            strong = np.isfinite(value) and abs(value) > 0.6 * limits[unit]
            text = f"{value:+.{unit.digits}f}" if np.isfinite(value) else "-"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if strong else "black")
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label=f"{unit.change}\n(blue: better)", shrink=0.6)
    figure.suptitle(f"{arm}\nminus {comparison.baseline}", fontsize=10)
    figure.savefig(path, dpi=130)


def draw(comparison: Comparison, values: Mapping[str, NDArray]) -> dict[str, Path]:
    """Write the PNG files into the comparison's folder; returns caption -> path."""
    task = comparison.task
    caption = f"{task.score.capitalize()} of the patients, each the mean over its {task.pattern}s and the seeds (line: median, diamond: mean)"
    drawn = {caption: comparison.out / "box_plots.png"}
    box_plots(values, comparison.measures, comparison.out / "box_plots.png")
    limits = {unit: _limit(comparison, unit, measures) for unit, measures in by_unit(comparison.measures).items()}
    for number, arm in enumerate((name for name in comparison.arms if name != comparison.baseline), 1):
        path = comparison.out / f"differences_{number}_{slug(arm)}.png"
        difference_map(comparison, arm, limits, path)
        drawn[f"{arm} minus {comparison.baseline}, by given sequences; the same colours in every such map"] = path
    return drawn


def by_unit(measures: Sequence[Measure]) -> dict[Unit, list[Measure]]:
    """What one scale of colours can show together."""
    found: dict[Unit, list[Measure]] = {}
    for measure in measures:
        found.setdefault(measure.unit, []).append(measure)
    return found


def slug(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60]


def _difference(comparison: Comparison, arm: str, pattern: str, measure: Measure) -> float:
    cell = comparison.cells.get((arm, pattern, measure.key))
    return measure.unit.shown(cell.difference.value) if cell and cell.difference else np.nan


def _limit(comparison: Comparison, unit: Unit, measures: Sequence[Measure]) -> float:
    """The largest difference of what is ranked: that of an oracle or a floor would leave the others pale."""
    keys = {measure.key for measure in measures}
    ranked = [cell for cell in comparison.cells.values() if cell.measure in keys and cell.difference and not comparison.arms[cell.arm].mark]
    return max([unit.colours_end, *(abs(unit.shown(cell.difference.value)) for cell in ranked)])
