"""mstkd: distil a teacher that sees every MR sequence into a student that works with any subset."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mstkd.loaded import LoadedModel

__version__ = "0.1.0"

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # patient data: nothing leaves unasked; MONAI imports MLflow on every rank


def load(path: "str | Path", spec: str | None = None) -> "LoadedModel":
    """A trained segmentation to use from Python: the folder that `mstkd export` wrote, or a run folder with its best weights.

    On the GPU if there is one; it takes neither DeepSpeed nor MLflow. `spec`: of a run whose data set has no packaged spec, the file that says
    how its cases are named and prepared. Raises UserError: no such folder, weights that do not fit, no spec.

        model = mstkd.load("student")
        result = model.predict({"flair": "p1_flair.nii.gz", "t1ce": "p1_t1ce.nii.gz"})
        result.save("p1_labels.nii.gz")
    """
    from mstkd.loaded import load as open_model  # torch takes seconds to import

    return open_model(path, spec)
