"""An MLflow model of a segmentation: NIfTI files as base64 text in, label maps as base64 text out.

It is written without pickling: a folder of safetensors, and this module as what loads it. So whatever serves it needs mstkd installed.
"""

import base64
import binascii
import os
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow.pyfunc
import nibabel as nib
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from mstkd.errors import UserError
from mstkd.export.facts import StudentFacts
from mstkd.export.weights import write_weights
from mstkd.loaded import LoadedModel, load
from mstkd.predict.case_list import BRAIN_MASK
from mstkd.trained_run import TrainedRun

os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # a uv project in the working directory is no part of the model

GZIP = b"\x1f\x8b"
PACKAGES = ("mstkd", "mlflow", "torch", "monai", "nibabel", "numpy", "scipy", "safetensors", "pandas")
EXAMPLE_SIZE = 16  # voxels per axis of the example's volumes


def write_model(run: TrainedRun, facts: StudentFacts, folder: Path) -> None:
    """The folder that `mlflow models serve -m FOLDER --env-manager local` serves: with signature, input example and requirements."""
    with TemporaryDirectory() as scratch:
        weights = Path(scratch) / "student"
        weights.mkdir()
        write_weights(run, facts, weights)
        mlflow.pyfunc.save_model(
            folder, loader_module=__name__, data_path=str(weights), signature=signature(facts), input_example=input_example(facts),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in PACKAGES],
        )  # fmt: skip


def signature(facts: StudentFacts) -> ModelSignature:
    """A row is a case: a text per sequence, each of which may be missing; out come its label map and what it was made from."""
    masks = [ColSpec(DataType.string, BRAIN_MASK)] if facts.files.brain_mask else []
    given = [ColSpec(DataType.string, name, required=False) for name in facts.sequences]
    return ModelSignature(Schema([*given, *masks]), Schema([ColSpec(DataType.string, name) for name in ("labels", "subset")]))


def input_example(facts: StudentFacts) -> pd.DataFrame:
    """One case of noise that shows the form."""
    draws = np.random.default_rng(0)
    names = [*facts.sequences, *([BRAIN_MASK] if facts.files.brain_mask else [])]
    volumes = [draws.integers(1, 100, (EXAMPLE_SIZE,) * 3).astype(np.uint8) if n != BRAIN_MASK else np.ones((EXAMPLE_SIZE,) * 3, np.uint8) for n in names]
    return pd.DataFrame([{name: base64.b64encode(nib.Nifti1Image(v, np.eye(4)).to_bytes()).decode() for name, v in zip(names, volumes, strict=True)}])


class Served:
    """What MLflow asks of a model that it has loaded."""

    def __init__(self, model: LoadedModel):
        self.model = model

    def predict(self, model_input: pd.DataFrame, params: dict | None = None) -> pd.DataFrame:
        """Per row: `labels`, a .nii.gz as base64 text, and `subset`. Raises UserError as `LoadedModel.predict`, or where a text is no file."""
        rows = [{name: text for name, text in row.items() if isinstance(text, str) and text} for row in model_input.to_dict("records")]
        return pd.DataFrame([self._case(row) for row in rows])

    def _case(self, texts: dict[str, str]) -> dict[str, str]:
        with TemporaryDirectory() as scratch:
            result = self.model.predict({name: _file(text, Path(scratch) / name) for name, text in texts.items()})
            path = Path(scratch) / "labels.nii.gz"
            result.save(path)
            return {"labels": base64.b64encode(path.read_bytes()).decode(), "subset": result.subset}


def _file(text: str, stem: Path) -> Path:
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise UserError(f"{stem.name}: no base64 text; send the bytes of a NIfTI file so") from None
    path = stem.with_name(f"{stem.name}.nii.gz" if content.startswith(GZIP) else f"{stem.name}.nii")
    path.write_bytes(content)
    return path


def _load_pyfunc(folder: str) -> Served:
    """MLflow's entry."""
    return Served(load(folder))
