"""MLflow runs that a hard kill left RUNNING: found by the ids that a run folder keeps, and closed.

Whether anything still works on a run is for the caller to know: MLflow cannot tell.
"""

from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from mstkd.config import RunConfig
from mstkd.track.protocol import Status
from mstkd.track.session import RunIds, tracking_uri


@dataclass(frozen=True)
class OpenRun:
    run_id: str
    part: str | None  # the child's name, e.g. "student"; None: the run itself
    started: float  # seconds since 1970


def left_running(config: RunConfig, run_dir: Path) -> list[OpenRun]:
    """The run and its children that MLflow shows as RUNNING; [] if its data base is gone. Raises what MLflow raises."""
    ids = RunIds(run_dir / "mlflow.json")
    client = _client(config, run_dir)
    if client is None or ids.run_id is None:
        return []
    infos = {part: client.get_run(run_id).info for part, run_id in {None: ids.run_id, **ids.children}.items()}
    return [OpenRun(info.run_id, part, info.start_time / 1000) for part, info in infos.items() if info.status == "RUNNING"]


def close(config: RunConfig, run_dir: Path, runs: list[OpenRun], status: Status, ended: float) -> None:
    """Give `runs` a status and the time of their end (seconds since 1970). Raises what MLflow raises."""
    client = _client(config, run_dir)
    for run in runs:
        client.set_terminated(run.run_id, status, end_time=round(1000 * max(ended, run.started)))


def _client(config: RunConfig, run_dir: Path) -> MlflowClient | None:
    """None if the run's data base is a file that no longer exists: MLflow would make an empty one."""
    uri = tracking_uri(config, run_dir)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return None
    return MlflowClient(tracking_uri=uri)
