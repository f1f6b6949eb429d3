"""`mstkd evaluate --pred DIR --ref DIR`: label maps against label maps."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from mstkd.config import EvaluateConfig
from mstkd.errors import UserError
from mstkd.evaluate.cases import Row, references, score_labels
from mstkd.evaluate.metrics import bounding_box
from mstkd.evaluate.scoring import conventions, decided
from mstkd.evaluate.summary import print_table, summarise, write_rows
from mstkd.files import write_json
from mstkd.shards.dataset import DatasetSpec, Volume, load_spec
from mstkd.shards.labels import read_labels
from mstkd.shards.nifti import AFFINE_TOLERANCE_MM, read_volume
from mstkd.shards.spec import LabelScheme


def evaluate_predictions(
    pred_dir: Path, ref_dir: Path, spec_name: str, out: Path, options: EvaluateConfig | None = None
) -> dict[str, Any]:
    """Score label maps <subject>.nii.gz in `pred_dir` against the truth in `ref_dir`, on the files' own grid.

    The truth is a data set in the spec's layout, or label maps <subject>.nii.gz. What `mstkd predict` noted in
    predictions.json names the subset; without it the subset is "given". Writes per_case.csv and summary.json to
    `out` and returns the summary. Raises UserError: nothing to score, no truth for a prediction, another grid,
    label values outside the spec's scheme.
    """
    options, spec = options or EvaluateConfig(), load_spec(spec_name, Path(ref_dir))
    if spec.scheme is None:
        raise UserError(f"spec {spec_name}: declares no label scheme; there is nothing to score")
    options = decided(options, spec.scheme)
    predictions = _label_maps(Path(pred_dir))
    if not predictions:
        raise UserError(f"{pred_dir}: no predictions; expected <subject>.nii.gz")
    noted = Path(pred_dir) / "predictions.json"
    known = json.loads(noted.read_text()).get("cases", {}) if noted.is_file() else {}
    truths = _truths(Path(ref_dir), spec, predictions)
    rows = []
    for subject, path in predictions.items():
        if subject not in truths:
            raise UserError(f"{path}: no truth for subject {subject} in {ref_dir}")
        for region, score in _score_files(path, truths[subject], spec, options).items():
            rows.append(Row("predictions", subject, known.get(subject, {}).get("subset", "given"), region, score))
    notes = conventions(options) | {"cases": f"{len(predictions)} predictions scored; {len(truths)} subjects have a truth"}
    summary = summarise(rows, list(spec.sequences), None, "given", None, notes)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_rows(Path(out) / "per_case.csv", rows)
    write_json(Path(out) / "summary.json", summary)
    print_table(summary, f"{pred_dir} against {ref_dir}")
    return summary


def _label_maps(folder: Path) -> dict[str, Path]:
    return {path.name.removesuffix(".nii.gz"): path for path in sorted(folder.glob("*.nii.gz"))}


def _truths(ref_dir: Path, spec: DatasetSpec, subjects: Iterable[str]) -> dict[str, Path | Volume]:
    """Subject -> its true label map: <subject>.nii.gz in the scheme's values if such files are there, else as the spec says."""
    maps = _label_maps(ref_dir)
    if any(subject in maps for subject in subjects):
        return maps
    return {case.subject: case.label for case in spec.find_cases(ref_dir, require_complete=False) if case.label}


def _score_files(prediction: Path, truth: Path | Volume, spec: DatasetSpec, options: EvaluateConfig) -> dict[str, Any]:
    scheme = spec.scheme
    predicted, own_affine = _read_labels(prediction, scheme)
    true, affine = read_labels(truth, spec) if isinstance(truth, Volume) else _read_labels(truth, scheme)
    if predicted.shape != true.shape or not np.allclose(own_affine, affine, rtol=0, atol=AFFINE_TOLERANCE_MM):
        raise UserError(f"{prediction}: its grid (shape or affine) differs from that of {truth}; predict on the original grid")
    spacing_mm = tuple(nib.affines.voxel_sizes(affine).tolist())
    diagonal_mm = float(np.linalg.norm(np.multiply(true.shape, spacing_mm)))
    either = (predicted > 0) | (true > 0)
    box = bounding_box(either) if either.any() else (slice(1),) * 3  # outside it both are background
    return score_labels(references(true[box], scheme, spacing_mm, diagonal_mm, true.size), predicted[box], scheme, options)


def _read_labels(path: Path, scheme: LabelScheme) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    labels, affine = read_volume(path)
    strange = [f"{value:g}" for value in np.unique(labels) if value not in scheme.values]
    if strange:
        raise UserError(f"{path}: label values {', '.join(strange[:5])} are outside scheme {scheme.name}; check --spec")
    return labels.astype(np.uint8), affine
