"""The student in MLflow, where the recipe's `tracking.log_model` asks for it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from mstkd.errors import UserError
from mstkd.export.facts import facts_of
from mstkd.predict.cases import dataset_of
from mstkd.track import Tracker
from mstkd.trained_run import TrainedRun


def check_model(run: TrainedRun) -> None:
    """Raise UserError where the model that is asked for cannot be made."""
    if not run.config.tracking.log_model:
        return
    if run.method.task != "segmentation":
        name = run.config.method["name"]
        raise UserError(f"tracking.log_model: a served model draws label maps, and {name} is for {run.method.task}; set it to false")
    dataset_of(run, None)


def log_model(run: TrainedRun, tracker: Tracker) -> None:
    """If it is asked for; registered under `tracking.register_as`, if that is given."""
    if not run.config.tracking.log_model:
        return
    from mstkd.export.mlflow_model import write_model  # MLflow takes seconds to import

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(run, facts_of(run, dataset_of(run, None)), folder)
        tracker.log_model(folder, run.networks[0], run.config.tracking.register_as)
