"""`mstkd export`: the network that a run is for, with what is needed to use it, in a folder of its own.

What lies in it names no host, path or person. `mstkd.load` opens the folders of format safetensors.
"""

from collections.abc import Callable
from pathlib import Path

from mstkd.errors import UserError
from mstkd.export.facts import StudentFacts, facts_of
from mstkd.export.weights import write_weights
from mstkd.files import whole_folder
from mstkd.predict.cases import dataset_of
from mstkd.trained_run import TrainedRun, open_run

Writer = Callable[[TrainedRun, StudentFacts, Path], None]  # into a folder


def export(run_dir: Path, out: Path, format: str = "safetensors", checkpoint: str = "best", spec: str | None = None) -> Path:
    """Write the folder `out`, which appears complete or not at all; returns it.

    safetensors: weights and mstkd.json. onnx, monai-bundle, mlflow: see the module of that name here. Weights of any other `checkpoint`
    than the best are put together from what DeepSpeed saved, without a GPU. `spec`: how cases are prepared, by default as in the run's data set.
    Raises UserError: no such format, `out` exists, no such checkpoint, a run that is no segmentation, what the format's module says.
    """
    out, write = Path(out), writer(format)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    run = open_run(run_dir, checkpoint)
    facts = facts_of(run, dataset_of(run, spec))
    with whole_folder(out) as partial:
        write(run, facts, partial)
    return out


def writer(format: str) -> Writer:
    """What writes `format`; the packages that it needs are imported here. Raises UserError if there is none."""
    match format:
        case "safetensors":
            return write_weights
        case "onnx":
            from mstkd.export.onnx import write_onnx

            return write_onnx
        case "monai-bundle":
            from mstkd.export.monai_bundle import write_bundle

            return write_bundle
        case "mlflow":
            from mstkd.export.mlflow_model import write_model

            return write_model
    raise UserError(f"export format {format!r}: choose safetensors, onnx, monai-bundle or mlflow")
