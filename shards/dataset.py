"""What a data set looks like on disk: `shards/specs/*.yaml`, or a YAML file of one's own."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, field_validator, model_serializer, model_validator

from mstkd.errors import UserError
from mstkd.recipe import read_yaml, validate_section
from mstkd.shards.cases import Case, find_cases
from mstkd.shards.patterns import NIFTI, SUBJECT, FilePattern, Volume
from mstkd.shards.scheme_check import check_scheme
from mstkd.shards.spec import LABEL_SCHEMES, LabelScheme, Strict, scheme_of

__all__ = ["Case", "DatasetSpec", "PreprocessConfig", "Volume", "known_specs", "load_spec"]

SPEC_FOLDER = Path(__file__).parent / "specs"
NNUNET = "nnunet"  # not a file: the spec is derived from the folder's dataset.json

Positive = Annotated[float, Field(gt=0)]


class PreprocessConfig(Strict):
    """How the volumes of a data set become what is stored."""

    spacing_mm: tuple[Positive, Positive, Positive] | None = None  # resample to it (X, Y, Z in RAS+); None: keep the files' own
    common_grid: str | None = None  # resample all sequences to the grid of this one by their headers; None: they must agree
    margin_voxels: int = Field(0, ge=0)  # kept around the brain box
    background: Literal["zero", "border"] = "zero"  # what is outside the brain: 0, or the value that fills the volume's border
    clahe: bool = False  # also store every sequence with its contrast equalised, for `method.intensity.kind: clahe`

    @model_serializer(mode="wrap")
    def _as_ever(self, write: SerializerFunctionWrapHandler) -> dict:
        """A data set that does not ask for it has the same digest as before it could."""
        return {key: value for key, value in write(self).items() if value or key != "clahe"}


class DatasetSpec(Strict):
    """The facts of a data set, as read from a YAML file.

    A file pattern names a file of a subject: `{subject}` stands for the subject, `*` for any part of one name, and
    `#k` at its end for channel k of a 4D file. It ends in .nii.gz or .nii (either is accepted on disk), .img (an
    Analyze or NIfTI pair with its .hdr) or .mgz.
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
    label_map: dict[int, int] | None = None  # value in the file -> value of the scheme; one neither mapped nor in the scheme stops the build
    label_rest: int | None = None  # with label_map: what every other value but 0 becomes
    site: str | None = None  # regular expression on the subject; its group is the site
    field_strength_t: Positive | dict[str, Positive] | None = None  # of all scanners, or per site
    preprocessing: PreprocessConfig = PreprocessConfig()
    label_exceptions: dict[str, str] = {}  # subject -> its label's file pattern
    label_scheme: str | LabelScheme | None = None
    patient: str | None = None  # regular expression on the subject; its group is the patient. Default: the subject

    @field_validator("label_scheme", mode="before")
    @classmethod
    def _one_scheme(cls, value: object) -> object:
        if isinstance(value, dict):
            try:
                value = LabelScheme.model_validate(value)
            except ValidationError as error:
                problem = error.errors()[0]
                raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
        if isinstance(value, str) and value not in LABEL_SCHEMES:
            raise ValueError(f"no such label scheme; known: {', '.join(LABEL_SCHEMES)}")
        if isinstance(value, LabelScheme):
            check_scheme(value)
        return value

    @field_validator("field_strength_t", mode="before")
    @classmethod
    def _per_site(cls, value: object) -> object:
        strengths = value.values() if isinstance(value, dict) else [value]
        if any(not isinstance(strength, float | int | None) or (strength or 1) <= 0 for strength in strengths):
            raise ValueError("give tesla, a number above 0, or one for each site: {Guys: 1.5, HH: 3.0}")
        return value

    @field_validator("patient", "site")
    @classmethod
    def _one_group(cls, value: str | None, info) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"needs exactly one group (...), which is the {info.field_name}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "DatasetSpec":
        for name in self.sequences:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"sequence name {name!r}: use letters, digits and _")
        self._check_patterns()
        if self.labels == "none" and (self.label or self.label_scheme):
            raise ValueError("labels: none, but label or label_scheme is given")
        if self.labels != "none" and not (self.label and self.label_scheme):
            raise ValueError(f"labels: {self.labels} needs label (a file pattern) and label_scheme")
        self._check_label_map()
        if isinstance(self.field_strength_t, dict) and self.site is None:
            raise ValueError("field_strength_t per site needs site, the regular expression that finds it in the subject")
        grid = self.preprocessing.common_grid
        if grid is not None and grid not in self.sequences:
            raise ValueError(f"preprocessing.common_grid: {grid!r} is no sequence; choose one of {', '.join(self.sequences)}")
        return self

    def _check_patterns(self) -> None:
        patterns = self.patterns(exceptions=False)
        self.patterns()  # parses the exceptions too
        if self.layout == "flat":
            for pattern in patterns:
                if SUBJECT not in pattern.stem:
                    raise ValueError("layout flat: every file pattern needs {subject}")
                if pattern.ambiguous:
                    text = pattern.stem + pattern.ending
                    raise ValueError(f"layout flat: {text!r} has * and {{subject}} in one name; keep them apart by a /")
        if len({pattern.same_volume for pattern in patterns}) < len(patterns):
            raise ValueError("two file patterns are the same")

    def _check_label_map(self) -> None:
        if self.label_map is None and self.label_rest is not None:
            raise ValueError("label_rest is given without label_map")
        if self.label_map is not None and self.scheme is None:
            raise ValueError("label_map is given, but the data set has no label_scheme")
        targets = {**(self.label_map or {}), **({} if self.label_rest is None else {"label_rest": self.label_rest})}
        for source, value in targets.items():
            if value not in self.scheme.values:
                allowed = ", ".join(map(str, self.scheme.values))
                raise ValueError(f"label_map: {source} becomes {value}, which is not in scheme {self.scheme.name} ({allowed})")

    @property
    def scheme(self) -> LabelScheme | None:
        """The label scheme, None where the data set has no labels."""
        return scheme_of(self.label_scheme)

    def sha256(self) -> str:
        """Digest of the facts, independent of the YAML file's wording."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def patterns(self, exceptions: bool = True) -> list[FilePattern]:
        """The file patterns of sequences, label and brain mask; with `exceptions` also those of single subjects."""
        texts = [*self.sequences.values(), self.label, self.brain_mask, *(self.label_exceptions.values() if exceptions else [])]
        return [FilePattern.parse(text) for text in texts if text]

    def expected(self) -> str:
        """The files of a subject, in words."""
        needed = (self.label if self.labels == "required" else None, self.brain_mask)
        texts = [*self.sequences.values(), *(text for text in needed if text)]
        prefix = "{subject}/" if self.layout == "folders" else ""
        either = " (.nii or .nii.gz)" if any(FilePattern.parse(text).endings == NIFTI for text in texts) else ""
        return ", ".join(prefix + text for text in texts) + either

    def find_cases(self, src: Path, require_complete: bool = True) -> list[Case]:
        """The cases under `src`, sorted by subject.

        With `require_complete` the spec's demands on sequences and labels hold; without it (prediction) any
        non-empty subset of sequences will do and no label is needed. A brain mask that the spec names is always
        needed. Raises UserError: no such folder, no case, a file that is missing or there twice, a subject that
        cannot be a key, or has no patient, site or field strength.
        """
        return find_cases(self, src, require_complete)


def load_spec(name_or_path: str | Path, src: Path | None = None) -> DatasetSpec:
    """The packaged spec of that name, or the one in the file at that path (.yaml); `nnunet` is read from `src`. Raises UserError."""
    if str(name_or_path) == NNUNET:
        from mstkd.shards.nnunet import nnunet_spec  # which needs this module

        if src is None:
            raise UserError("spec nnunet: is read from the folder's dataset.json; give the folder, or a path ending in .yaml")
        return nnunet_spec(src)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SPEC_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join([*known_specs(), NNUNET])
            raise UserError(f"spec {name_or_path}: unknown; known: {known}; or give a path ending in .yaml")
    if not path.is_file():
        raise UserError(f"spec {path}: no such file")
    values, lines = read_yaml(path)
    spec = validate_section(DatasetSpec, values, "", path.name, {key: f"{path.name}:{line}" for key, line in lines.items()})
    if path.parent.resolve() != SPEC_FOLDER and spec.name in known_specs() and spec.sha256() != load_spec(spec.name).sha256():
        # predict finds the packaged one by this name
        raise UserError(f"{path.name}: {spec.name!r} is the name of a packaged data set that differs; give yours another name")
    return spec


def known_specs() -> list[str]:
    """Names of the packaged specs; `nnunet`, which fits any nnU-Net folder, comes beside them."""
    return sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml"))
