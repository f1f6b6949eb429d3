"""The file patterns of a data set spec: which file in a folder is which subject's volume."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mstkd.errors import UserError

NIFTI = (".nii.gz", ".nii")
ON_DISK = {".nii.gz": NIFTI, ".nii": NIFTI, ".img": (".img",), ".hdr": (".img",), ".mgz": (".mgz",)}
"""Ending in a pattern -> endings accepted on disk. An Analyze or NIfTI pair is known by its .img, which needs its .hdr."""
SUBJECT = "{subject}"


@dataclass(frozen=True)
class Volume:
    """One volume in a file: the whole of it, or one channel along the fourth axis."""

    path: Path
    channel: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.channel is None else f"{self.path}, channel {self.channel}"


@dataclass(frozen=True)
class FilePattern:
    """A path below a folder, parsed: `{subject}` stands for the subject, `*` for any part of one name."""

    stem: str  # without ending
    ending: str  # as written
    channel: int | None = None  # of a 4D file; None: the file holds one volume

    @classmethod
    def parse(cls, text: str) -> "FilePattern":
        """The pattern written as `text`, e.g. `imagesTr/{subject}.nii.gz#2`. Raises ValueError, saying what is wrong."""
        path, mark, channel = text.partition("#")
        ending = next((ending for ending in ON_DISK if path.endswith(ending)), None)
        if ending is None:
            raise ValueError(f"file pattern {text!r} does not end in .nii.gz or .nii (NIfTI), .img (Analyze) or .mgz")
        if mark and not re.fullmatch("[0-9]+", channel):
            raise ValueError(f"file pattern {text!r}: what follows # is the channel of a 4D file: 0, 1, ...")
        if unknown := [name for name in re.findall(r"\{[^}]*\}", path) if name != SUBJECT]:
            raise ValueError(f"file pattern {text!r}: {unknown[0]} stands for nothing; write {SUBJECT}, or * for any part of a name")
        if path.startswith("/") or "**" in path:
            raise ValueError(f"file pattern {text!r}: give a path below the folder, with at most one * in a row")
        return cls(path.removesuffix(ending), ending, int(channel) if mark else None)

    @property
    def endings(self) -> tuple[str, ...]:
        """The endings accepted on disk."""
        return ON_DISK[self.ending]

    @property
    def ambiguous(self) -> bool:
        """Whether a file name alone does not tell what of it is the subject."""
        return any("*" in name and SUBJECT in name for name in self.stem.split("/"))

    @property
    def same_volume(self) -> tuple:
        """Equal for two patterns that name the same volumes."""
        return self.stem, self.endings, self.channel

    def example(self, subject: str) -> str:
        """The path of a subject's file as the spec writes it."""
        return self.stem.replace(SUBJECT, subject) + self.ending

    def find(self, root: Path, subject: str) -> Volume | None:
        """The subject's volume below `root`, None if absent. Raises UserError: two files fit, or a half of a pair is missing."""
        stem = self.stem.replace(SUBJECT, subject)
        found = [path for ending in self.endings for path in _files(root, stem, ending)]
        if len(found) > 1:
            raise UserError(f"{root}: both {found[0].relative_to(root)} and {found[1].relative_to(root)} exist; remove one")
        if not found:
            return None
        if found[0].suffix == ".img" and not found[0].with_suffix(".hdr").is_file():
            raise UserError(f"{found[0]}: its header {found[0].with_suffix('.hdr').name} is not beside it; copy both files")
        return Volume(found[0], self.channel)

    def subjects(self, root: Path) -> set[str]:
        """All subjects that have such a file below `root`; the pattern holds `{subject}`."""
        globbed, names = _glob(self.stem).replace(glob.escape(SUBJECT), "*"), re.compile(self._regex(self.stem))
        paths = (path for ending in self.endings for path in glob.iglob(globbed + glob.escape(ending), root_dir=root))
        matches = (names.fullmatch(path.replace(os.sep, "/")) for path in paths)
        return {match["subject"] for match in matches if match}

    def subjects_of(self, path: str) -> Iterator[str]:
        """Subjects that a file listed elsewhere, by whatever folder, may be of: by the whole pattern, then by its last name."""
        for stem in dict.fromkeys((self.stem, self.stem.rpartition("/")[2])):
            if SUBJECT in stem and (match := re.fullmatch("(?:.*/)?" + self._regex(stem), path)):
                yield match["subject"]

    def _regex(self, stem: str) -> str:
        pieces = {SUBJECT: "(?P<subject>[^/]+)", "*": "[^/]*"}
        written = []
        for piece in re.split(r"(\{subject\}|\*)", stem):
            written.append(pieces.get(piece, re.escape(piece)))
            if piece == SUBJECT:
                pieces[SUBJECT] = "(?P=subject)"  # where a pattern repeats {subject}, it is the same one
        return "".join(written) + "(?:" + "|".join(map(re.escape, self.endings)) + ")"


def _files(root: Path, stem: str, ending: str) -> list[Path]:
    if "*" not in stem:
        path = root / (stem + ending)
        return [path] if path.is_file() else []
    return [root / path for path in sorted(glob.glob(_glob(stem) + glob.escape(ending), root_dir=root)) if (root / path).is_file()]


def _glob(stem: str) -> str:
    return "*".join(glob.escape(part) for part in stem.split("*"))
