"""Where the figures of a run go: JSON lines in the run folder, and MLflow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mstkd.config import RunConfig
from mstkd.track.jsonl import JsonlTracker
from mstkd.track.protocol import CompositeTracker, NullTracker, Status, Tracker

__all__ = ["CompositeTracker", "NullTracker", "Status", "Tracker", "open_comparison", "open_evaluation", "open_study", "open_trackers"]


def open_trackers(
    config: RunConfig, run_dir: Path, *, attempt: int, tags: dict[str, object], dataset: dict[str, Any]
) -> Tracker:
    """The trackers of a run, for rank 0 alone; the other ranks take a `NullTracker`.

    `attempt` counts from 1; `tags` are facts of this attempt (git sha, ranks, task ...); `dataset`: see
    `Tracker.log_dataset`. MLflow continues the run that `run_dir/mlflow.json` names. Use it as a context manager.
    """
    from mstkd.track.mlflow_tracker import open_mlflow  # MLflow takes seconds to import: rank 0 alone pays

    tracker = CompositeTracker([JsonlTracker(run_dir / "metrics.jsonl", attempt), *open_mlflow(config, run_dir, dataset)])
    tracker.set_tags({"method": config.method["name"], "attempt": attempt, "data_digest": dataset["digest"], **tags})
    return tracker


def open_evaluation(config: RunConfig, run_dir: Path, name: str) -> Tracker:
    """Where an evaluation's figures go: the child `name` of the training run that `run_dir/mlflow.json` names."""
    from mstkd.track.mlflow_tracker import open_evaluation as open_child

    return open_child(config, run_dir, name)


def open_comparison(config: RunConfig, run_dir: Path, name: str) -> Tracker:
    """Where a comparison's figures go: a new run `name` in the experiment of a tracked run; else one that keeps nothing."""
    if not (run_dir / "mlflow.json").is_file():
        return Tracker()
    from mstkd.track.mlflow_tracker import open_comparison as open_run

    return open_run(config, run_dir, name)


def open_study(config: RunConfig, folder: Path, kinds: Sequence[str], arms: dict[str, str]) -> Tracker:
    """The run above those of a study, see there."""
    from mstkd.track.mlflow_tracker import open_study as open_run

    return open_run(config, folder, kinds, arms)
