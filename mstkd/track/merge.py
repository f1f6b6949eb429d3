"""`mstkd mlflow merge`: the data bases of submitted runs, joined into the one that the MLflow page shows.

Each <runs>/<run>/mlflow.db is copied as it stands at one moment, also while its job writes, and what <runs>/mlflow.db
lacks of it is logged there through MLflow's client.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from mstkd.errors import UserError
from mstkd.track.copying import Copied, Target
from mstkd.track.database import ARTIFACTS, DATABASE, prepare_database
from mstkd.track.snapshot import Snapshot, alone, run_databases


def merge(runs_dir: Path) -> Iterator[Copied]:
    """Bring `runs_dir`/mlflow.db up to date with the data base of every run folder in it; one result per folder, then one per sweep.

    One that cannot be read is reported and the rest goes on. Raises UserError if there is nothing to merge, or if
    `runs_dir`/mlflow.db cannot take it.
    """
    runs_dir = Path(runs_dir).resolve()
    databases = run_databases(runs_dir)
    if not databases:
        raise UserError(f"{runs_dir}: no run in it has an {DATABASE} of its own; give the folder of the submitted runs (others need no merge)")
    with alone(runs_dir, "merge"), tempfile.TemporaryDirectory() as scratch:
        prepare_database(runs_dir)
        database = runs_dir / DATABASE
        target = Target(MlflowClient(f"sqlite:///{database}"), str(database), runs_dir / ARTIFACTS, f"move {DATABASE} aside and merge anew")
        source = Snapshot(Path(scratch) / DATABASE)
        for database in databases:
            name = database.parent.name
            try:
                source.copy(database)
            except UserError as error:
                yield Copied(name, "unreadable", str(error))
            else:
                yield Copied(name, target.take(source.client, list(source.trees()), database.parent))
        yield from target.rank_sweeps()
