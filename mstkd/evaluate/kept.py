"""The scores of an evaluation that may be interrupted, case by case, so that a restart goes on where it stopped."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from mstkd.files import whole_file, write_text

log = logging.getLogger(__name__)

IDENTITY = ".identity.json"  # no subject key begins with a dot
Result = TypeVar("Result")
Clock = dict[str, list[float]]


class KeptScores(Generic[Result]):
    """A folder with one file per scored case, for as long as an evaluation is not finished.

    `kind` is the dataclass of a score. `clocks` are lists by network that scoring a case appends to (seconds, say): what it appended is
    kept beside its scores.
    """

    def __init__(self, folder: Path, kind: type[Result], clocks: Sequence[Clock] = ()):
        self.folder, self.clocks = folder, clocks
        self._file = TypeAdapter(tuple[list[kind], list[dict[str, list[float]]]])

    def begin(self, identity: dict) -> None:
        """Make the folder; scores of anything else than `identity` (weights, data, conventions) are thrown away. For one rank, before the others."""
        noted, text = self.folder / IDENTITY, json.dumps(identity, sort_keys=True)
        if noted.is_file() and noted.read_text() == text:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(noted, text)

    def read(self, subject: str) -> list[Result] | None:
        """The scores of a case; None where it is not scored yet, or its file was cut short."""
        path = self._path(subject)
        if not path.is_file():
            return None
        try:
            scores, ticked = self._file.validate_json(path.read_bytes())
        except ValidationError:
            log.warning("%s is damaged; the case is scored again", path)
            return None
        for clock, times in zip(self.clocks, ticked, strict=True):
            for name, values in times.items():
                clock.setdefault(name, []).extend(values)
        return scores

    def keep(self, subject: str, score: Callable[[str], list[Result]]) -> list[Result]:
        """`score(subject)`, once it lies on disk."""
        before = [{name: len(values) for name, values in clock.items()} for clock in self.clocks]
        scores = score(subject)
        ticked = [{name: values[was.get(name, 0) :] for name, values in clock.items()} for clock, was in zip(self.clocks, before)]
        with whole_file(self._path(subject)) as stream:
            stream.write(self._file.dump_json((scores, ticked)))
        return scores

    def _path(self, subject: str) -> Path:
        return self.folder / f"{subject}.json"
