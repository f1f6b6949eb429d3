"""What a data set looks like on disk: `shards/specs/*.yaml`, and the cases that a folder holds."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mstkd.config import read_yaml, validate_section
from mstkd.errors import UserError
from mstkd.shards.spec import LABEL_SCHEMES, SUBJECT_KEY, LabelScheme, Strict, scheme_of

EXTENSIONS = (".nii.gz", ".nii")
SPEC_FOLDER = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class Volume:
    """One volume in a file: the whole of it, or one channel along the fourth axis."""

    path: Path
    channel: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.channel is None else f"{self.path}, channel {self.channel}"


@dataclass(frozen=True)
class Case:
    """The files of one subject; `files` has the sequences that exist, in the data set's order."""

    subject: str
    patient: str
    files: dict[str, Volume]
    label: Volume | None = None
    brain: Volume | None = None
    site: str | None = None
    field_strength_t: float | None = None


class PreprocessConfig(Strict):
    """How the volumes of a data set become what is stored."""

    spacing_mm: tuple[float, float, float] | None = None  # resample to it (X, Y, Z in RAS+); None: keep the files' own
    common_grid: str | None = None  # resample all sequences to the grid of this one by their headers; None: they must agree
    margin_voxels: int = Field(0, ge=0)  # kept around the brain box
    background: Literal["zero", "border"] = "zero"  # what is outside the brain: 0, or the value that fills the volume's border


class DatasetSpec(Strict):
    """The facts of a data set, as read from a YAML file.

    A file pattern contains `{subject}` and ends in .nii.gz or .nii; either ending is accepted on disk.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    description: str
    licence: str = ""
    layout: Literal["folders", "flat"]
    """folders: patterns are relative to a folder named as the subject, at any depth. flat: relative to the source folder."""
    sequences: dict[str, str] = Field(min_length=1)  # name -> file pattern, in channel order
    allow_missing: bool = False  # subjects may lack sequences (never all of them)
    labels: Literal["required", "optional", "none"] = "required"
    label: str | None = None  # file pattern
    brain_mask: str | None = None  # file pattern; without it the brain is the union of non-background voxels
    label_map: dict[int, int] | None = None  # value in the file -> value of the scheme; others stop the build
    label_rest: int | None = None  # with label_map: what every other value becomes
    site: str | None = None  # regular expression on the subject; its group is the site
    field_strength_t: float | dict[str, float] | None = None  # of all scanners, or per site
    preprocessing: PreprocessConfig = PreprocessConfig()
    label_exceptions: dict[str, str] = {}  # subject -> its label's file pattern
    label_scheme: str | LabelScheme | None = None
    patient: str | None = None  # regular expression on the subject; its group is the patient. Default: the subject

    @field_validator("label_scheme")
    @classmethod
    def _known_scheme(cls, value: str | LabelScheme | None) -> str | LabelScheme | None:
        if isinstance(value, str) and value not in LABEL_SCHEMES:
            raise ValueError(f"no such label scheme; known: {', '.join(LABEL_SCHEMES)}")
        return value

    @field_validator("patient")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError("needs exactly one group (...), which is the patient")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "DatasetSpec":
        for name in self.sequences:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"sequence name {name!r}: use letters, digits and _")
        patterns = [*self.sequences.values(), *([self.label] if self.label else [])]
        for pattern in (*patterns, *self.label_exceptions.values()):
            if not pattern.endswith(EXTENSIONS):
                raise ValueError(f"file pattern {pattern!r} does not end in .nii.gz or .nii")
        if self.layout == "flat" and any("{subject}" not in pattern for pattern in patterns):
            raise ValueError("layout flat: every file pattern needs {subject}")
        if len(set(patterns)) < len(patterns):
            raise ValueError("two file patterns are the same")
        if self.labels == "none" and (self.label or self.label_scheme):
            raise ValueError("labels: none, but label or label_scheme is given")
        if self.labels != "none" and not (self.label and self.label_scheme):
            raise ValueError(f"labels: {self.labels} needs label (a file pattern) and label_scheme")
        return self

    @property
    def scheme(self) -> LabelScheme | None:
        """The label scheme, None where the data set has no labels."""
        return scheme_of(self.label_scheme)

    def sha256(self) -> str:
        """Digest of the facts, independent of the YAML file's wording."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def expected(self) -> str:
        """The files of a subject, in words."""
        patterns = [*self.sequences.values(), *([self.label] if self.labels == "required" else [])]
        prefix = "{subject}/" if self.layout == "folders" else ""
        return ", ".join(prefix + pattern for pattern in patterns) + " (.nii or .nii.gz)"

    def find_cases(self, src: Path, require_complete: bool = True) -> list[Case]:
        """The cases under `src`, sorted by subject.

        With `require_complete` the spec's demands on sequences and labels hold; without it (prediction) any
        non-empty subset of sequences will do and no label is needed. Raises UserError: no such folder, no case,
        a file that is missing or there twice, a subject that cannot be a key or has no patient.
        """
        src = Path(src)
        if not src.is_dir():
            raise UserError(f"{src}: no such folder; give the one that holds the cases")
        roots = self._subject_folders(src) if self.layout == "folders" else self._flat_subjects(src)
        if not roots:
            raise UserError(f"{src}: no case of data set {self.name}; expected {self.expected()}")
        return [self._case(subject, roots[subject], require_complete) for subject in sorted(roots)]

    def _case(self, subject: str, root: Path, require_complete: bool) -> Case:
        if not SUBJECT_KEY.fullmatch(subject):
            raise UserError(f"{root}: subject {subject!r} cannot be a key; rename it to letters, digits, _ and - only")
        found = {name: _find(root, _named(pattern, subject)) for name, pattern in self.sequences.items()}
        files = {name: Volume(path) for name, path in found.items() if path}
        missing = [name for name in found if name not in files]
        if not files or (missing and require_complete and not self.allow_missing):
            raise UserError(f"subject {subject}: no {missing[0]}; expected {root / _named(self.sequences[missing[0]], subject)}")
        label = self._label_file(subject, root)
        if label is None and require_complete and self.labels == "required":
            expected = root / _named(self.label, subject)
            raise UserError(f"subject {subject}: no label; expected {expected}, or say labels: optional in the spec")
        return Case(subject, self._patient(subject), files, Volume(label) if label else None)

    def _label_file(self, subject: str, root: Path) -> Path | None:
        if self.label is None:
            return None
        exception = self.label_exceptions.get(subject)
        found = _find(root, _named(exception, subject)) if exception else None
        return found or _find(root, _named(self.label, subject))

    def _patient(self, subject: str) -> str:
        if self.patient is None:
            return subject
        match = re.fullmatch(self.patient, subject)
        if match is None:
            raise UserError(f"subject {subject}: does not fit patient: {self.patient!r} of data set {self.name}; correct the spec")
        return match[1]

    def _subject_folders(self, src: Path) -> dict[str, Path]:
        """Subject -> its folder, for every folder under `src` (or `src` itself) that holds an expected file."""
        roots: dict[str, Path] = {}
        for name, folders, files in os.walk(src, followlinks=True):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            root, subject = Path(name), Path(name).resolve().name
            patterns = [*self.sequences.values(), *([self.label] if self.label else [])]
            if any(_find(root, _named(pattern, subject)) for pattern in patterns):
                if subject in roots:
                    raise UserError(f"subject {subject}: two folders, {roots[subject]} and {root}; keep one")
                roots[subject] = root
            elif any(file.endswith(EXTENSIONS) and not file.startswith(".") for file in files):
                raise UserError(f"{root}: holds NIfTI files, but none that data set {self.name} names; expected {self.expected()}")
        return roots

    def _flat_subjects(self, src: Path) -> dict[str, Path]:
        """Subject -> `src`, for every file under `src` that fits a pattern."""
        subjects = set()
        for pattern in [*self.sequences.values(), *([self.label] if self.label else [])]:
            stem = _stem(pattern)
            placeholder, again = re.escape("{subject}"), r"\1"  # where a pattern repeats {subject}, it is the same one
            regex = re.escape(stem).replace(placeholder, "([^/]+)", 1).replace(placeholder, again) + r"\.nii(?:\.gz)?"
            for path in src.glob(stem.replace("{subject}", "*") + ".nii*"):
                match = re.fullmatch(regex, path.relative_to(src).as_posix())
                if match and not path.name.startswith("."):
                    subjects.add(match[1])
        return dict.fromkeys(subjects, src)


def load_spec(name_or_path: str | Path) -> DatasetSpec:
    """The packaged spec of that name, or the one in the file at that path (.yaml). Raises UserError."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SPEC_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise UserError(f"spec {name_or_path}: unknown; known: {', '.join(known_specs())}; or give a path ending in .yaml")
    if not path.is_file():
        raise UserError(f"spec {path}: no such file")
    values, lines = read_yaml(path)
    return validate_section(DatasetSpec, values, "", path.name, {key: f"{path.name}:{line}" for key, line in lines.items()})


def known_specs() -> list[str]:
    """Names of the packaged specs."""
    return sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml"))


def _stem(pattern: str) -> str:
    return pattern.removesuffix(".gz").removesuffix(".nii")


def _named(pattern: str, subject: str) -> str:
    return pattern.replace("{subject}", subject)


def _find(root: Path, name: str) -> Path | None:
    """`name` under `root` with either ending; None if absent, UserError if both are there."""
    found = [path for extension in EXTENSIONS if (path := root / (_stem(name) + extension)).is_file()]
    if len(found) > 1:
        raise UserError(f"{root}: both {found[0].name} and {found[1].name} exist; remove one")
    return found[0] if found else None
