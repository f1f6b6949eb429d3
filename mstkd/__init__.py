"""mstkd: distil a teacher that sees every MR sequence into a student that works with any subset."""

import os

__version__ = "0.1.0"

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # patient data: nothing leaves unasked; MONAI imports MLflow on every rank
