"""MLflow's SQLite files: made whole before a job starts, and checked before they are read.

Those of submitted runs have one writer each, rank 0. MLflow leaves SQLite at its rollback journal and waits 20 s
for a lock, which a shared file system can bear; a write-ahead log it could not.
"""

import functools
import os
import secrets
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from mstkd.errors import UserError

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"  # in the folder of the runs, or of one submitted run
LOCK_WAIT_S = 20.0


def prepare_database(folder: Path) -> None:
    """Make `folder/mlflow.db` with MLflow's tables and nothing in them, so that jobs never race to make them.

    One that exists stays. Raises UserError if that one is of another MLflow, or damaged.
    """
    path = Path(folder) / DATABASE
    if path.exists():
        check_schema(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{DATABASE}.{secrets.token_hex(4)}")
    partial.write_bytes(_empty_database())
    try:
        os.link(partial, path)  # in one move, and never over one that somebody else has begun to fill
    except FileExistsError:
        check_schema(path)
    except OSError:  # a file system without hard links
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_schema(path: Path, original: Path | None = None) -> None:
    """Raise UserError unless `path` is a SQLite file with the tables of the MLflow that is installed here.

    `original`: the file to name, if `path` is a copy of it.
    """
    expected = _newest_schema()
    try:
        found = _schema(path)
    except sqlite3.Error as error:
        raise unreadable(original or path, error) from None
    if found != expected:
        file = Path(original or path).resolve()
        raise UserError(
            f"{file}: its tables are of another MLflow (version {found}, here {expected}); keep a copy and run "
            f"mlflow db upgrade sqlite:///{file}, or use the MLflow that wrote it"
        )


def unreadable(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: not a readable MLflow data base ({reason}); restore it from a copy, or move it aside")


def connect(path: Path) -> sqlite3.Connection:
    """A connection to an existing SQLite file; one that a killed job left in mid-write is rolled back by SQLite."""
    return sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=rw", uri=True, timeout=LOCK_WAIT_S)


def _schema(path: Path) -> str | None:
    with closing(connect(path)) as connection:
        row = connection.execute("select version_num from alembic_version").fetchone()
    return row[0] if row else None


@functools.cache
def _newest_schema() -> str | None:
    """The version of the tables that the installed MLflow makes."""
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations")).get_current_head()


@functools.cache  # MLflow takes a second or more to make its tables; a sweep needs many
def _empty_database() -> bytes:
    """A SQLite file as MLflow makes it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / DATABASE
        # the root is for MLflow's unused default experiment, which would otherwise note the working directory
        SqlAlchemyStore(f"sqlite:///{path}", "mlflow-artifacts:/").engine.dispose()
        return path.read_bytes()
