"""`mstkd predict`: label maps for a folder of NIfTI cases, each with whatever sequences it has; or the sequences that cases lack.

What a synthesis run makes is in `mstkd/complete.py`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mstkd.data.sample import Sample
from mstkd.errors import UserError
from mstkd.evaluate.completed_inputs import CompletingPredictor
from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.weights import TrainedRun, open_run
from mstkd.shards.dataset import Case, DatasetSpec, Volume, known_specs, load_spec
from mstkd.shards.preprocess import preprocess
from mstkd.shards.raw_case import check_headers, grid_sequence
from mstkd.subsets import largest_given, subset_name


def predict_folder(
    run_dir: Path, input: Path, output: Path, spec: str | None = None, postprocess: str | None = None, complete: Path | None = None
) -> list[Path]:
    """Write <output>/<subject>.nii.gz for every case in `input`, and predictions.json (subject -> sequences used).

    The layout and file names of `input` are those of `spec`, by default of the run's own data set; any non-empty
    subset of sequences will do, labels are not looked at. Label maps are uint8 in the run's label scheme, on the
    grid of the case's first sequence (of the spec's `common_grid`, where it has one). If the spec resamples, the
    networks' logits are interpolated on that grid and labels decided there. `postprocess`: another rule than the run's own.
    `complete`: a synthesis run that first makes what a case lacks; the networks then see every sequence. `output` appears when all is done. Raises UserError: output exists, no case, an unreadable file, sequences of a case on different grids.
    """
    output = Path(output)
    refuse_existing(output)
    run = open_run(run_dir).postprocessed(postprocess)
    dataset, cases = cases_of(run, Path(input), spec)
    predictor, used = CompletingPredictor(run, open_run(complete, tasks=("synthesis",))) if complete else run.predictor(), {}
    with whole_folder(output) as partial, evaluation_mode(run.method):
        for case in cases:
            labels, used[case.subject] = predict_case(predictor, run.networks[0], case, dataset)
            save_like(labels, case.files[grid_sequence(case, dataset)], partial / f"{case.subject}.nii.gz")
            Console().print(f"{case.subject}: {used[case.subject]}", highlight=False)
        (partial / "predictions.json").write_text(json.dumps(used, indent=1) + "\n")
    return [output / f"{case.subject}.nii.gz" for case in cases]


def cases_of(run: TrainedRun, input: Path, spec: str | None) -> tuple[DatasetSpec, list[Case]]:
    """The cases in a folder, all headers read: a bad last case must not cost the others. Raises UserError as `predict_folder`."""
    dataset = dataset_of(run, spec, input)
    cases = dataset.find_cases(input, require_complete=False)
    for case in cases:
        check_headers(case, dataset)
    return dataset, cases


def dataset_of(run: TrainedRun, spec: str | None, input: Path | None = None) -> DatasetSpec:
    """How the run's cases lie on disk and are prepared: as in its own data set, or as `spec` says. Raises UserError where that is not known."""
    if spec is None and run.dataset not in known_specs():
        raise UserError(f"{run.folder}: its data set {run.dataset} has no packaged spec; say how files are named with --spec FILE")
    dataset = load_spec(spec or run.dataset, input)
    if unknown := [name for name in dataset.sequences if name not in run.facts.sequences]:
        raise UserError(f"spec {dataset.name}: the run knows no sequence {unknown[0]}, only {', '.join(run.facts.sequences)}; choose another --spec")
    return dataset


def refuse_existing(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output}: exists already; choose another --output or remove it")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to fill that becomes `output` when the block ends; if it fails, nothing is there."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_like(data: NDArray, reference: Volume, path: Path, description: str = "") -> None:
    """Write `data`, which lies on the grid of the volume `reference`, as NIfTI."""
    nib.save(like(data, reference, description), path)


def like(data: NDArray, reference: Volume, description: str = "") -> nib.Nifti1Image:
    """`data`, which lies on the grid of the volume `reference`, with its geometry, its own type and none of the other's texts."""
    source = nib.load(reference.path)
    if not isinstance(source, nib.Nifti1Pair):  # Analyze, MGH: their headers mean other things
        image = nib.Nifti1Image(data, source.affine)
        image.header["descrip"] = description.encode()
        return image
    header = source.header.copy()
    header.extensions.clear()
    for text in {"descrip", "aux_file", "db_name", "intent_name"}.intersection(header.keys()):  # NIfTI-2 has no db_name
        header[text] = b""  # may name people or places
    header["descrip"] = description.encode()
    header["cal_min"] = header["cal_max"] = 0
    header.set_data_dtype(data.dtype)
    kind = nib.Nifti2Image if isinstance(source, nib.Nifti2Image | nib.Nifti2Pair) else nib.Nifti1Image
    return kind(data, source.affine, header)


def predict_case(predictor: Predictor, network: str, case: Case, dataset: DatasetSpec) -> tuple[NDArray[np.uint8], str]:
    """The label map on the file's grid, and the subset it was made from."""
    stored = preprocess(replace(case, label=None), dataset, predictor.sequences)
    shown = predictor.case(Sample(stored.image, stored.brain, None, stored.meta))
    subset = largest_given(case.subject, predictor.sequences, predictor.takes, shown.present)
    return predictor.file_labels(network, *shown.given(subset)), subset_name(predictor.sequences, subset)
