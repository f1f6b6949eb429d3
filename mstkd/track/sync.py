"""`mstkd mlflow sync`: runs that were tracked without a server, brought to one.

A store is a folder with an mlflow.db: that of the runs, or a submitted run's own. Per run it takes about ten calls, one per 1000
points, one per file, and one per metric that has gone on since the last time.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mstkd.errors import UserError
from mstkd.track.copying import MERGED_FROM, MERGED_SWEEP, Copied, Target
from mstkd.track.database import DATABASE
from mstkd.track.session import RunIds
from mstkd.track.snapshot import Snapshot, Tree, alone, run_databases

UNSEEN = "point --to at its address, e.g. http://tracker:5000, and sync again: what is there stays, the rest is added"


@dataclass(frozen=True)
class Store:
    """A data base, and the one run of it that is asked for; None: all."""

    database: Path
    run_id: str | None = None


def sync(uri: str, paths: Sequence[Path]) -> Iterator[Copied]:
    """Bring the tracking server at `uri` up to date with the stores, or the run folders, at `paths`; one result per run, then one per sweep.

    Raises UserError if there is nothing to bring, or if the server cannot be reached or does not take it.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        raise UserError(f"--to {uri}: is no address of a tracking server; give one such as http://tracker:5000 (mstkd mlflow merge joins local data bases)")
    stores = [store for path in paths for store in stores_of(Path(path).resolve())]
    shown = urlsplit(uri)._replace(netloc=urlsplit(uri).netloc.rpartition("@")[2]).geturl()  # without a password
    with ExitStack() as held, tempfile.TemporaryDirectory() as scratch, _reached(shown):
        for folder in dict.fromkeys(store.database.parent for store in stores):
            held.enter_context(alone(folder, "sync"))
        elsewhere = "start it with --artifacts-destination, so that it takes files, and use another tracking.experiment"
        target = Target(MlflowClient(uri), shown, None, elsewhere)
        source = Snapshot(Path(scratch) / DATABASE)
        for store in stores:
            try:
                source.copy(store.database)
            except UserError as error:
                yield Copied(store.database.parent.name, "unreadable", str(error))
            else:
                for tree in _asked(source, store, target.taken):
                    yield Copied(tree.runs[0].info.run_name, target.take(source.client, [tree], store.database.parent))
        yield from target.rank_sweeps()


def stores_of(path: Path) -> list[Store]:
    """What lies at `path`: a folder with a data base and those of the runs in it, or a run folder. Raises UserError if it is neither.

    Those of the runs come first: what is merged already is a copy of them, and may be an older one.
    """
    found = [Store(database) for database in [*run_databases(path), path / DATABASE] if database.is_file()]
    if found:
        return found
    if run_id := RunIds(path / "mlflow.json").run_id:
        for folder in path.parents[:2]:  # of the runs, or of the study
            if (folder / DATABASE).is_file():
                return [Store(folder / DATABASE, run_id)]
    raise UserError(f"{path}: no {DATABASE} in it, nor is it a run that {path.parent / DATABASE} knows; give the folder of the runs, or of one of them")


def _asked(source: Snapshot, store: Store, taken: set[str]) -> Iterator[Tree]:
    """The trees of the copied store that are asked for, without those that came from a store before."""
    before = set(taken)
    for tree in source.trees():
        tags = [run.data.tags for run in tree.runs]
        origins = {tag.get(MERGED_SWEEP) or tag.get(MERGED_FROM) or run.info.run_id for tag, run in zip(tags, tree.runs, strict=True)}
        if MERGED_SWEEP in tags[0]:
            tree = Tree(tree.experiment, [run for run in tree.runs if run.data.tags.get(MERGED_FROM) not in before])
            if len(tree.runs) == 1 and len(origins) > 1:  # all its members came from their own folders, and so does the ranking
                continue
        elif origins & before:
            continue
        if store.run_id is not None:
            tree = tree.around(store.run_id)
        if tree is not None:
            yield tree


@contextmanager
def _reached(address: str) -> Iterator[None]:
    """A server that fails is the user's to know, in one line."""
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        if "Max retries exceeded" in cause or "Connection" in cause:
            cause = "no answer"
        raise UserError(f"{address}: {cause[:300]}; {UNSEEN}") from None
