"""The best, the median and the worst case as images that page.js draws: every sequence, the truth, and what runs predict from a few subsets.

Slices are axial, in radiological convention (the patient's right on the left, anterior up), and show the brain alone.
"""

import base64
import io
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mstkd.errors import UserError
from mstkd.evaluate.cases import Row
from mstkd.evaluate.completed_inputs import CompletingPredictor, open_front
from mstkd.evaluate.figures import WINDOW, CasePicture, colours
from mstkd.evaluate.report import best_median_worst, case_pictures, shown_subsets
from mstkd.evaluate.scoring import Score
from mstkd.evaluate.summary import mean_known
from mstkd.report.entries import ReportedRun
from mstkd.report.scores import SegmentationScores
from mstkd.subsets import Subset, parse_subset, subset_name
from mstkd.trained_run import open_run

log = logging.getLogger(__name__)

MOST_SLICES, MOST_PIXELS = 80, 256  # of a case, and along an axis of a slice: a page must stay small enough to be mailed
COLUMNS = 10  # slices side by side in a sprite
BLOCK = 8  # pixels: slices begin at multiples of JPEG's block, so that none bleeds into the next
QUALITY = 85


@dataclass(frozen=True)
class Viewers:
    """What page.js is given, or in words why there is nothing to show."""

    content: dict[str, Any] | None
    note: str


def viewers(runs: Sequence[ReportedRun]) -> Viewers:
    """The cases are chosen by the first run's scores; the other runs on the same data predict them as well."""
    first = runs[0]
    if not isinstance(first.task, SegmentationScores):
        return Viewers(None, "")
    subsets = _subsets(first)
    chosen: dict[str, str] = {}
    content: dict[str, Any] = {}
    left_out = []
    for run in runs:
        try:
            if run.data["digest"] != first.data["digest"]:
                raise UserError(f"{run.folder}: was trained on other data than {first.folder}")
            pictures, chosen = _pictures(run, subsets, chosen)
        except (UserError, OSError) as error:
            log.warning("%s is left out of the case viewers: %s", run.label, error)  # it names paths: not for the page
            left_out.append(run.label)
            continue
        content = content or _frame(first, subsets, pictures, chosen)
        for case, picture in zip(content["cases"], pictures, strict=True):
            case["predictions"][run.label] = {name: packed(_shown(labels)) for name, labels in picture.predictions.items()}
            case["dice"][run.label] = _dice(run, chosen[picture.title])
    if not content:
        return Viewers(None, "No case can be shown: the shard set or the weights cannot be read where the run found them, or no case has every sequence.")
    note = f" Not shown: {', '.join(left_out)}, whose data, shards or weights are others or gone." if left_out else ""
    return Viewers(content, note)


def _subsets(run: ReportedRun) -> list[Subset]:
    """Those of an evaluation's figures and the one that was hardest, as far as they were scored."""
    scored = run.entries[0].summary["subsets"]
    dice = {name: mean_known([cell["dice"] for cell in cells.values()]) for name, cells in scored.items()}
    shown = shown_subsets(run.sequences)
    hardest = min(dice, key=lambda name: dice[name] if dice[name] is not None else 2.0)
    try:
        shown += [subset for subset in (parse_subset(hardest, run.sequences),) if subset not in shown]
    except UserError:  # each case was scored once, given all it has
        return shown[:1]
    fitting = [subset for subset in shown if subset_name(run.sequences, subset) in scored]
    return sorted(fitting, key=lambda subset: -sum(subset))


def _pictures(run: ReportedRun, subsets: Sequence[Subset], chosen: dict[str, str]) -> tuple[list[CasePicture], dict[str, str]]:
    """Pictures of the cases, and who they are: rank -> subject. Raises UserError: weights or shards gone, no complete case."""
    trained = open_run(run.folder)
    front = run.config.evaluate.complete
    predictor = CompletingPredictor(trained, open_front(front)) if front else trained.predictor()
    if not chosen:
        complete = {*trained.source.complete(run.subjects)}
        chosen = best_median_worst([_row(row) for row in run.entries[0].rows if row["subject"] in complete])
    if not chosen:
        raise UserError(f"{run.folder}: none of its cases has every sequence")
    return case_pictures(predictor, run.entries[0].network, trained.source, chosen, trained.facts.label_scheme, subsets), chosen


def _row(row: dict[str, str]) -> Row:
    score = Score(float(row["dice"]), int(row["truth_voxels"]), int(row["predicted_voxels"]))
    return Row(row["network"], row["subject"], row["subset"], row["region"], score)


def _frame(run: ReportedRun, subsets: Sequence[Subset], pictures: Sequence[CasePicture], chosen: dict[str, str]) -> dict[str, Any]:
    """All but the predictions."""
    first = pictures[0]
    regions = [
        {"name": name, "colour": colour, "truth": first.truth_scheme.regions[name], "predicted": first.scheme.regions[name]}
        for name, (_, colour) in colours(first.scheme).items()
    ]
    means = {rank: mean_known([float(row["dice"]) for row in run.entries[0].rows if row["subject"] == subject]) for rank, subject in chosen.items()}
    return {
        "sequences": run.sequences,
        "regions": regions,
        "subsets": [{"name": subset_name(run.sequences, subset), "given": list(subset)} for subset in subsets],
        "cases": [_case(picture, means[picture.title]) for picture in pictures],
    }


def _case(picture: CasePicture, mean_dice: float) -> dict[str, Any]:
    slices, height, width = _shown(picture.truth).shape
    return {
        "rank": picture.title, "mean_dice": round(mean_dice, 4), "slices": slices, "width": width, "height": height, "columns": COLUMNS,
        "every": ceil(picture.truth.shape[2] / MOST_SLICES), "aspect": picture.spacing_mm[1] / picture.spacing_mm[0],
        "tile": [_tile(width), _tile(height)], "images": {name: sprite(image) for name, image in picture.images.items()},
        "truth": packed(_shown(picture.truth)), "predictions": {}, "dice": {},
    }  # fmt: skip


def _dice(run: ReportedRun, subject: str) -> dict[str, dict[str, float]]:
    """Subset -> region -> Dice, as scored."""
    found: dict[str, dict[str, float]] = {}
    for row in run.entries[0].rows:
        if row["subject"] == subject:
            found.setdefault(row["subset"], {})[row["region"]] = round(float(row["dice"]), 4)
    return found


def _shown(volume: NDArray) -> NDArray:
    """Slices (K, height, width) of a volume (X, Y, Z) as they are looked at, thinned where there are too many slices or pixels."""
    every, coarser = ceil(volume.shape[2] / MOST_SLICES), ceil(max(volume.shape[:2]) / MOST_PIXELS)
    return np.flip(volume[::coarser, ::coarser, ::every], (0, 1)).transpose(2, 1, 0)


def packed(labels: NDArray[np.uint8]) -> str:
    """Label maps as base64 of deflated bytes, slice by slice, row by row."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(labels).tobytes(), 9)).decode()


def sprite(volume: NDArray) -> str:
    """A sequence (X, Y, Z) as a data URI of one grey JPEG with the slices in rows of COLUMNS."""
    low, high = np.percentile(volume[volume > volume.min()].astype(np.float32), WINDOW) if volume.max() > volume.min() else (0, 1)
    slices = _shown(np.clip((volume.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1))
    count, height, width = slices.shape
    sheet = np.zeros((ceil(count / COLUMNS) * _tile(height), COLUMNS * _tile(width)), np.uint8)
    for k, picture in enumerate(np.round(255 * slices).astype(np.uint8)):
        top, left = k // COLUMNS * _tile(height), k % COLUMNS * _tile(width)
        sheet[top : top + height, left : left + width] = picture
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tile(pixels: int) -> int:
    return ceil(pixels / BLOCK) * BLOCK
