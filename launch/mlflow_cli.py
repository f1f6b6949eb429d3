"""`mstkd mlflow ...`: the data base of the runs and its page."""

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from mstkd.errors import UserError

mlflow = typer.Typer(help="The MLflow data base of the runs.")

SAYS = {"empty": "no run yet", "deleted": "deleted there, left so"}


@mlflow.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 5000,
    runs_dir: Annotated[Path, typer.Option(help="Where the runs and their mlflow.db lie.")] = Path("runs"),
) -> None:
    """Serve the MLflow pages of the local runs on 127.0.0.1, until Ctrl-C.

    Example: mstkd mlflow ui --port 5000
    """
    database = runs_dir.resolve() / "mlflow.db"
    if not database.is_file():
        if next(runs_dir.glob("*/mlflow.db"), None):
            raise UserError(f"{database}: no such file, but submitted runs have their own; run this first: mstkd mlflow merge {runs_dir}")
        raise UserError(f"{database}: no such file; train first, or point --runs-dir at the folder of the runs")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} on 127.0.0.1 is taken; choose another with --port")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    typer.echo(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
    sys.stdout.flush()
    # the server takes this process over: a signal or Ctrl-C reaches it directly
    os.execve(sys.executable, command, {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})


@mlflow.command()
def merge(
    runs_dir: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="The folder of the submitted runs.")] = Path("runs"),
) -> None:
    """Join the data bases of submitted runs into RUNS_DIR/mlflow.db, for `mstkd mlflow ui`.

    Can be repeated at any time, also while runs train: it adds what is new.

    Members of a sweep come under one parent, ranked by their best validation score.

    Example: mstkd mlflow merge runs
    """
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: no such folder; give the folder of the runs")
    from mstkd.track.merge import merge as run

    _say(run(runs_dir), "merged")


@mlflow.command()
def sync(
    to: Annotated[str, typer.Option(metavar="URI", help="The tracking server, e.g. http://tracker:5000.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[STORE|RUN]...", help="Folders of runs (default: runs), with or without a merge, or single run folders.")
    ] = None,
) -> None:
    """Bring runs that were tracked offline to a tracking server, with everything that MLflow holds of them.

    Can be repeated at any time, also after it was interrupted, and while runs train: it adds what is new, and nothing twice.

    Example: mstkd mlflow sync --to http://tracker:5000 runs
    """
    paths = paths or [Path("runs")]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give the folder of the runs, or of one of them")
    from mstkd.track.sync import sync as run

    _say(run(to, paths), "brought to the server")


def _say(copied: Iterable, done: str) -> None:
    """A line for each; raises UserError at the end if some could not be read. `done`: what the others are."""
    results = []
    for result in copied:
        results.append(result)
        typer.echo(f"{result.name}: {result.reason or SAYS.get(result.outcome, result.outcome)}")
    unreadable = [result for result in results if result.outcome == "unreadable"]
    if unreadable:
        names = ", ".join(result.name for result in unreadable)
        raise UserError(f"{len(unreadable)} of {len(results)} could not be {done}: {names}; the reasons are above, the others are up to date")
