"""Keyed hashes in place of subject and patient keys.

The salt and the table that leads back lie outside the shard set; who has neither can only guess with both in hand.
"""

import csv
import hashlib
import hmac
import io
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mstkd.errors import UserError
from mstkd.files import create_file
from mstkd.shards.cases import Case
from mstkd.shards.spec import Fold, Splits

SALT_BYTES = 32
MIN_SALT_BYTES = 16
KEY_DIGITS = 16  # hexadecimal
OWNER_ONLY = 0o600
HEADER = ("subject", "patient", "new_subject", "new_patient")  # of the table that leads back
SALT_FILE = "mstkd-pseudonyms.salt"


@dataclass(frozen=True)
class Pseudonyms:
    """New keys for old ones. The same salt gives a patient the same key in every shard set."""

    salt: bytes
    salt_file: Path

    def subject(self, key: str) -> str:
        """The key that replaces a subject's: S- and 16 hexadecimal digits of HMAC-SHA256."""
        return f"S-{self._digest('subject', key)}"

    def patient(self, key: str) -> str:
        """The key that replaces a patient's; all scans of one patient keep one."""
        return f"P-{self._digest('patient', key)}"

    def check(self) -> str:
        """Tells two salts apart, and nothing else."""
        return self._digest("check", "")

    def _digest(self, kind: str, key: str) -> str:
        return hmac.new(self.salt, f"{kind}:{key}".encode(), hashlib.sha256).hexdigest()[:KEY_DIGITS]

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        """The cases under their new keys, sorted by them. Raises UserError if two would share one."""
        renamed = [replace(case, subject=self.subject(case.subject), patient=self.patient(case.patient)) for case in cases]
        patients = {case.patient for case in cases}
        if len({case.subject for case in renamed}) < len(cases) or len({case.patient for case in renamed}) < len(patients):
            raise UserError(f"{self.salt_file}: two keys have the same hash under this salt; use another --salt-file")
        return sorted(renamed, key=lambda case: case.subject)

    def splits(self, splits: Splits) -> Splits:
        """Splits by original keys, by the new ones."""

        def renamed(keys: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(sorted(self.subject(key) for key in keys))

        folds = tuple(Fold(train=renamed(fold.train), val=renamed(fold.val), test=renamed(fold.test)) for fold in splits.folds)
        return splits.model_copy(update={"folds": folds, "test": renamed(splits.test)})

    def write_table(self, cases: Sequence[Case], out: Path) -> Path:
        """Write the CSV that leads from old keys to new ones, next to the salt, mode 600.

        A table of an earlier try is completed. Raises UserError if it leads to keys that this salt does not make.
        """
        path = self.salt_file.parent / f"{out.name}.keys.csv"
        rows = {(case.subject, case.patient, self.subject(case.subject), self.patient(case.patient)) for case in cases}
        if create_file(path, _table(rows), OWNER_ONLY):
            return path
        earlier = {tuple(row) for row in csv.reader(io.StringIO(path.read_text()))} - {HEADER}
        if any(len(row) != len(HEADER) or row[2:] != (self.subject(row[0]), self.patient(row[1])) for row in earlier):
            raise UserError(f"{path}: exists and leads to the keys of another set; move it away, it is all that leads back")
        complete = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        create_file(complete, _table(rows | earlier), OWNER_ONLY)
        complete.replace(path)
        return path


def _table(rows: set[tuple[str, ...]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([HEADER, *sorted(rows)])
    return stream.getvalue().encode()


def read_pseudonyms(salt_file: Path | None, out: Path) -> Pseudonyms:
    """The pseudonyms of the salt in `salt_file`, by default one in the folder that `out` is in, which is made if absent.

    Raises UserError: no such file, too short, readable by others, inside the shard set.
    """
    path = out.absolute().parent / SALT_FILE if salt_file is None else Path(salt_file).absolute()
    inside = (out.resolve(), out.with_name(f"{out.name}.partial").resolve())
    if any(path.resolve().is_relative_to(folder) for folder in inside):
        raise UserError(f"salt {path}: lies inside the shard set; keep it elsewhere, it must not travel with the set")
    if salt_file is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_file(path, f"{secrets.token_hex(SALT_BYTES)}\n".encode(), OWNER_ONLY)
    if not path.is_file():
        raise UserError(f"salt {path}: no such file; leave out --salt-file to have one made")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UserError(f"salt {path}: others may read it (mode {mode:o}); run chmod 600, or keep it elsewhere")
    salt = path.read_bytes().strip()
    if len(salt) < MIN_SALT_BYTES:
        raise UserError(f"salt {path}: {len(salt)} bytes; give at least {MIN_SALT_BYTES} random ones")
    return Pseudonyms(salt, path)
