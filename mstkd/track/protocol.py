"""The tracker protocol: where the figures of a run go.

A step counts finished updates: a record at step s describes the networks after s updates of its stage, so 0 is
the state before training.
"""

from pathlib import Path
from typing import Any, Literal, Self

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """One run, or one part of it. Every method of this base does nothing; a tracker overrides what it can keep.

    As a context manager it finishes with the right status: FINISHED, FAILED after an exception, KILLED after
    Ctrl-C or `sys.exit`, which is how a preempted job leaves.
    """

    def log_metrics(self, values: dict[str, float], step: int, stage: str) -> None:
        """Keep scalars by name, e.g. {"train/loss": 0.3}, for the state after `step` updates of `stage`."""

    def log_validation(self, figures: dict[str, float], step: int, stage: str) -> None:
        """Keep the figures of a validation after `step` updates of `stage`, as "val/<name>"."""
        self.log_metrics({f"val/{name}": value for name, value in figures.items()}, step, stage)

    def log_params(self, params: dict[str, object]) -> None:
        """Keep settings by dotted name. The first value stays: a resumed run never changes one."""

    def set_tags(self, tags: dict[str, object]) -> None:
        """Keep facts about the run by name, e.g. {"ranks": 8}; the last value stays."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """Keep a copy of the file `path` under `folder`."""

    def log_table(self, columns: dict[str, list], file: str) -> None:
        """Keep a table, given by column, as `file`, e.g. "tables/subsets.json"; None: an empty cell."""

    def log_dataset(self, dataset: dict[str, Any], context: str) -> None:
        """Keep what is read and what for, e.g. "testing": {"name", "digest", and what of "schema" and "profile" is known}."""

    def describe(self, text: str, heading: str = "") -> None:
        """Say `text`, Markdown, of this run or part, in place of what was said before under the same `heading`, or without one."""

    def whole_run(self) -> "Tracker":
        """The run that this is a part of, which needs no finishing here."""
        return self

    def log_model(self, folder: Path, name: str, register: str | None) -> None:
        """Keep a copy of the MLflow model in `folder` as `name`, and as the next version of the registered model `register`, if given."""

    def child(self, name: str, tags: dict[str, object] | None = None, *, start_step: int | None = None) -> "Tracker":
        """The part called `name` (a stage, the evaluation), continued if it exists.

        `start_step`: the updates that the part starts with, 0 for a fresh start. What an earlier attempt logged
        beyond it will be logged again and must not appear twice. None: nothing is replayed.
        """
        return self

    def finish(self, status: Status) -> None:
        """Close this part and its children with `status`. A second call changes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


class NullTracker(Tracker):
    """Keeps nothing: for every rank but the first."""


class CompositeTracker(Tracker):
    """Hands every call to several trackers, in order."""

    def __init__(self, trackers: list[Tracker]):
        self.trackers = trackers

    def log_metrics(self, values: dict[str, float], step: int, stage: str) -> None:
        for tracker in self.trackers:
            tracker.log_metrics(values, step, stage)

    def log_validation(self, figures: dict[str, float], step: int, stage: str) -> None:
        for tracker in self.trackers:
            tracker.log_validation(figures, step, stage)

    def log_params(self, params: dict[str, object]) -> None:
        for tracker in self.trackers:
            tracker.log_params(params)

    def set_tags(self, tags: dict[str, object]) -> None:
        for tracker in self.trackers:
            tracker.set_tags(tags)

    def log_artifact(self, path: Path, folder: str) -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path, folder)

    def log_table(self, columns: dict[str, list], file: str) -> None:
        for tracker in self.trackers:
            tracker.log_table(columns, file)

    def log_dataset(self, dataset: dict[str, Any], context: str) -> None:
        for tracker in self.trackers:
            tracker.log_dataset(dataset, context)

    def describe(self, text: str, heading: str = "") -> None:
        for tracker in self.trackers:
            tracker.describe(text, heading)

    def whole_run(self) -> Tracker:
        return CompositeTracker([tracker.whole_run() for tracker in self.trackers])

    def log_model(self, folder: Path, name: str, register: str | None) -> None:
        for tracker in self.trackers:
            tracker.log_model(folder, name, register)

    def child(self, name: str, tags: dict[str, object] | None = None, *, start_step: int | None = None) -> Tracker:
        return CompositeTracker([tracker.child(name, tags, start_step=start_step) for tracker in self.trackers])

    def finish(self, status: Status) -> None:
        for tracker in self.trackers:
            tracker.finish(status)
