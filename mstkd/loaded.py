"""A trained segmentation with all that it takes to use it on files: what `mstkd.load` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.export.facts import FACTS, read_facts
from mstkd.export.weights import load_exported
from mstkd.methods import DataFacts, build
from mstkd.predict.case import predict_case
from mstkd.predict.case_list import BRAIN_MASK
from mstkd.predict.cases import dataset_of
from mstkd.predict.images import like
from mstkd.shards.dataset import Case, DatasetSpec, Volume
from mstkd.shards.raw_case import grid_sequence
from mstkd.trained_run import open_run


@dataclass(frozen=True)
class LabelMap:
    """The labels of a case on the grid, and in the axes, of its first sequence's file."""

    labels: NDArray[np.uint8]  # the file's 3 axes
    affine: NDArray[np.float64]  # (4, 4), voxel -> mm
    subset: str  # the sequences that were used, e.g. "flair+t1ce"
    image: nib.Nifti1Image

    def save(self, path: str | Path) -> None:
        """Write NIfTI, .nii.gz or .nii."""
        nib.save(self.image, path)


class LoadedModel:
    """Networks, normalisation, window and label scheme of one segmentation."""

    def __init__(self, predictor: Predictor, network: str, dataset: DatasetSpec):
        self.predictor, self.network, self.dataset = predictor, network, dataset
        self.sequences = predictor.sequences  # that it knows; any subset of them will do, unless `predictor.takes` lists some
        self.label_scheme = predictor.scheme  # of its label maps

    def predict(self, images: Mapping[str, str | Path] | str | Path) -> LabelMap:
        """The label map of one case: sequence name -> NIfTI file, or a folder with files named as in the data set of training.

        Every sequence that is given is used. Raises UserError: none or an unknown sequence, an unreadable file, files on different grids, and
        where the network takes only some subsets, none of these.
        """
        case = self._in_folder(Path(images)) if isinstance(images, str | Path) else self._case(images)
        with evaluation_mode(*self.predictor.methods):
            found = predict_case(self.predictor, self.network, case, self.dataset)
        image = like(found.labels, case.files[grid_sequence(case, self.dataset)])
        return LabelMap(found.labels, image.affine, found.subset_name, image)

    def _in_folder(self, folder: Path) -> Case:
        cases = self.dataset.find_cases(folder, require_complete=False)
        if len(cases) > 1:
            raise UserError(f"{folder}: holds {len(cases)} cases; give the folder of one, or use mstkd predict")
        return cases[0]

    def _case(self, images: Mapping[str, str | Path]) -> Case:
        masked = self.dataset.brain_mask is not None
        if unknown := [name for name in images if name not in (*self.sequences, *([BRAIN_MASK] if masked else []))]:
            raise UserError(f"sequence {unknown[0]!r}: unknown; this model knows {', '.join(self.sequences)}")
        if masked and BRAIN_MASK not in images:
            raise UserError(f"{BRAIN_MASK}: missing; this model was trained on images with one")
        files = {name: Volume(Path(images[name])) for name in self.sequences if name in images}
        if not files:
            raise UserError(f"no image given; this model knows {', '.join(self.sequences)}")
        return Case("case", "case", files, brain=Volume(Path(images[BRAIN_MASK])) if masked else None)


def load(path: str | Path, spec: str | None = None) -> LoadedModel:
    """`mstkd.load`, where it is described."""
    path = Path(path)
    if (path / FACTS).is_file():
        facts = read_facts(path)
        method = build(facts.method, DataFacts(facts.sequences, facts.label_scheme, facts.crop))
        load_exported(method, facts, path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for name in facts.weights:
            method.networks[name].to(device)
        return LoadedModel(Predictor(method, facts.sequences, facts.crop, facts.inference, device, facts.label_scheme), facts.network, facts.spec)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: neither a folder written by mstkd export nor a run folder")
    run = open_run(path)
    return LoadedModel(run.predictor(), run.networks[0], dataset_of(run, spec))
