"""The cases that a folder holds, found by the file patterns of a data set spec."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mstkd.errors import UserError
from mstkd.shards.patterns import ON_DISK, FilePattern, Volume
from mstkd.shards.spec import KEY_LIMIT, SUBJECT_KEY

if TYPE_CHECKING:
    from mstkd.shards.dataset import DatasetSpec


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


def find_cases(spec: "DatasetSpec", src: Path, require_complete: bool) -> list[Case]:
    """`DatasetSpec.find_cases`, where it is described."""
    src = Path(src)
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; give the one that holds the cases")
    roots = _subject_folders(spec, src) if spec.layout == "folders" else _flat_subjects(spec, src)
    if not roots:
        raise UserError(f"{src}: no case of data set {spec.name}; expected {spec.expected()}")
    return [_case(spec, subject, roots[subject], require_complete) for subject in sorted(roots)]


def find_usable_cases(spec: "DatasetSpec", src: Path) -> tuple[list[Case], dict[str, str]]:
    """For prediction: the cases under `src` as `find_cases` without `require_complete`, and by subject why others cannot be used.

    Raises UserError: no such folder, no case, good or bad, a subject with two folders.
    """
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; give the one that holds the cases, or a list of them")
    problems: dict[str, str] = {}
    roots = _subject_folders(spec, src, problems) if spec.layout == "folders" else _flat_subjects(spec, src)
    if not roots and not problems:
        raise UserError(f"{src}: no case of data set {spec.name}; expected {spec.expected()}")
    cases = []
    for subject in sorted(roots):
        try:
            cases.append(_case(spec, subject, roots[subject], require_complete=False))
        except UserError as error:
            problems[subject] = str(error)
    return cases, problems


def _subject_folders(spec: "DatasetSpec", src: Path, strangers: dict[str, str] | None = None) -> dict[str, Path]:
    """Subject -> its folder, for every folder under `src` (or `src` itself) that holds an expected file.

    A folder that holds other NIfTI files is told to `strangers`; without them it raises UserError.
    """
    roots: dict[str, Path] = {}
    patterns = spec.patterns()
    for name, folders, files in os.walk(src, followlinks=True):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        root, subject = Path(name), Path(os.path.abspath(name)).name  # a linked folder counts by the link's name
        if any(pattern.find(root, subject) for pattern in patterns):
            if subject in roots:
                raise UserError(f"subject {subject}: two folders, {roots[subject]} and {root}; keep one")
            roots[subject] = root
        elif any(file.endswith(tuple(ON_DISK)) and not file.startswith(".") for file in files) and not _below(root, roots):
            problem = f"{root}: holds NIfTI files, but none that data set {spec.name} names; expected {spec.expected()}"
            if strangers is None:
                raise UserError(problem)
            strangers[subject] = problem
    return roots


def _below(folder: Path, roots: dict[str, Path]) -> bool:
    """Whether `folder` is inside a subject's folder: what else is in there is the subject's business."""
    return any(folder.is_relative_to(root) for root in roots.values())


def _flat_subjects(spec: "DatasetSpec", src: Path) -> dict[str, Path]:
    """Subject -> `src`, for every file under `src` that fits a pattern."""
    return dict.fromkeys(set().union(*(pattern.subjects(src) for pattern in spec.patterns(exceptions=False))), src)


def _case(spec: "DatasetSpec", subject: str, root: Path, require_complete: bool) -> Case:
    if not SUBJECT_KEY.fullmatch(subject[:KEY_LIMIT]):  # longer ones can still be pseudonymised
        raise UserError(f"{root}: subject {subject!r} cannot be a key; rename it to letters, digits, _ and - only")
    found = {name: FilePattern.parse(text).find(root, subject) for name, text in spec.sequences.items()}
    files = {name: volume for name, volume in found.items() if volume}
    missing = [name for name in found if name not in files]
    if not files or (missing and require_complete and not spec.allow_missing):
        raise UserError(f"subject {subject}: no {missing[0]}; expected {_expected(spec.sequences[missing[0]], subject, root)}")
    label = _label(spec, subject, root)
    if label is None and require_complete and spec.labels == "required":
        expected = _expected(spec.label, subject, root)
        raise UserError(f"subject {subject}: no label; expected {expected}, or say labels: optional in the spec")
    site = _group(spec, "site", subject)
    return Case(
        subject, _group(spec, "patient", subject) or subject, files, label, _brain(spec, subject, root), site,
        _field_strength_t(spec, subject, site),
    )  # fmt: skip


def _label(spec: "DatasetSpec", subject: str, root: Path) -> Volume | None:
    texts = (spec.label_exceptions.get(subject), spec.label)
    return next((volume for text in texts if text and (volume := FilePattern.parse(text).find(root, subject))), None)


def _brain(spec: "DatasetSpec", subject: str, root: Path) -> Volume | None:
    """The given mask. It is never optional, also in prediction: the intensities are normalised over it."""
    if spec.brain_mask is None:
        return None
    found = FilePattern.parse(spec.brain_mask).find(root, subject)
    if found is None:
        expected = _expected(spec.brain_mask, subject, root)
        raise UserError(f"subject {subject}: no brain mask; expected {expected}, or take brain_mask out of the spec")
    return found


def _group(spec: "DatasetSpec", key: str, subject: str) -> str | None:
    """What the spec's regular expression `key` makes of a subject; None without one."""
    pattern = getattr(spec, key)
    if pattern is None:
        return None
    match = re.fullmatch(pattern, subject)
    if match is None or not match[1]:
        raise UserError(f"subject {subject}: does not fit {key}: {pattern!r} of data set {spec.name}; correct the spec")
    return match[1]


def _field_strength_t(spec: "DatasetSpec", subject: str, site: str | None) -> float | None:
    if not isinstance(spec.field_strength_t, dict):
        return spec.field_strength_t
    if site not in spec.field_strength_t:
        known = ", ".join(spec.field_strength_t)
        raise UserError(f"subject {subject}: site {site} has no field_strength_t in data set {spec.name}, only {known}; add it to the spec")
    return spec.field_strength_t[site]


def _expected(text: str, subject: str, root: Path) -> Path:
    return root / FilePattern.parse(text).example(subject)
