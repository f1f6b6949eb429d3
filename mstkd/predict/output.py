"""The folder that predictions go to: filled case by case, by one process or many, and continued where one was interrupted.

OUTPUT/<subject>.nii.gz, what else was asked for in folders beside, and predictions.json. OUTPUT/.cases/ holds the settings that all
share and one record per case, which is also its lock: whoever predicts a case holds it, and it is written last.
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mstkd.errors import UserError
from mstkd.files import create_file, write_json
from mstkd.run_folder import leaves

RECORDS, SETTINGS, PREDICTIONS = ".cases", ".settings.json", "predictions.json"  # no subject begins with a dot


def refuse_existing(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output}: exists already; choose another --output or remove it")


class Record:
    """What is noted of one case, held by this process alone."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self) -> dict[str, Any] | None:
        """None: nothing yet, or a process was killed while it wrote."""
        self._file.seek(0)
        return _parsed(self._file.read())

    def write(self, values: dict[str, Any]) -> None:
        """Replace it, on the disk."""
        self._file.truncate(0)
        self._file.write(json.dumps(values).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


class Output:
    """A folder of predictions."""

    def __init__(self, folder: Path):
        self.folder, self.records = Path(folder), Path(folder) / RECORDS

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, before anything slow begins; if the block fails it is as it was. Raises UserError where it holds something else."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if there - {RECORDS} and not (self.records / SETTINGS).is_file():  # settings come first: looked for after what is there
            raise UserError(f"{self.folder}: exists already, and not from mstkd predict; choose another --output or remove it")
        self.records.mkdir(parents=True, exist_ok=True)
        if not os.access(self.records, os.W_OK):
            raise UserError(f"{self.folder}: cannot be written; choose another --output")
        try:
            yield
        except BaseException:
            for folder in (self.records, self.folder):
                try:
                    folder.rmdir()
                except OSError:  # not empty: it was there before
                    break
            raise

    def settle(self, settings: dict[str, Any]) -> None:
        """Note what all predictions here share. Raises UserError, naming the first difference, where others were made."""
        if create_file(self.records / SETTINGS, json.dumps(settings).encode()):
            return
        noted = _parsed((self.records / SETTINGS).read_bytes()) or {}
        before, now = (dict(leaves(values)) for values in (noted, json.loads(json.dumps(settings))))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise UserError(f"{self.folder}: was begun with {key} {before.get(key)}, and now it is {now.get(key)}; put it back, or choose another --output")

    def noted(self, subject: str) -> dict[str, Any] | None:
        """What is noted of a case at this moment, without a claim."""
        path = self.records / f"{subject}.json"
        return _parsed(path.read_bytes()) if path.is_file() else None

    @contextmanager
    def claimed(self, subject: str) -> Iterator[Record | None]:
        """The record of a case; None where another process predicts it at this moment."""
        with (self.records / f"{subject}.json").open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            except OSError:
                pass  # a file system without locks: files appear whole anyway, a case might be predicted twice
            yield Record(file)

    @contextmanager
    def placed(self, subject: str, name: str) -> Iterator[Path]:
        """A path to write to, for a case that is claimed; what lies there becomes OUTPUT/`name` when the block ends."""
        final = self.folder / name
        final.parent.mkdir(exist_ok=True)
        partial = self.records / f"{subject}.partial{''.join(Path(name).suffixes)}"
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(final)

    def lies_there(self, names: Collection[str]) -> bool:
        return all((self.folder / name).is_file() for name in names)

    def remove(self, names: Collection[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def summarise(self, head: dict[str, Any], subjects: Collection[str]) -> dict[str, Any]:
        """Write predictions.json from the records of all cases; a failure is told of those of `subjects` alone, the input's.

        Until nothing changed meanwhile: of several processes the last one to write has then seen what every other one did.
        """
        written = None
        while (whole := self._whole(head, subjects)) != written:
            write_json(self.folder / PREDICTIONS, whole)
            written = whole
        return whole

    def _whole(self, head: dict[str, Any], subjects: Collection[str]) -> dict[str, Any]:
        found = {path.stem: _parsed(path.read_bytes()) or {} for path in sorted(self.records.glob("*.json")) if path.name != SETTINGS}
        cases = {subject: record["case"] for subject, record in found.items() if "case" in record}
        failed = {subject: record["failed"] for subject, record in found.items() if "failed" in record and subject in subjects}
        return head | {"cases": cases, "failed": failed}


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(content)
    except ValueError:
        return None
