"""Cases listed in a file: a CSV table, or JSON as MONAI's datalists are.

CSV: a row per case, a column `subject` and one per sequence, empty where the case lacks it (and `brain_mask`, where the data set has one).
JSON: a list of items, or an object with one under `testing` or `test`; an item has the same keys, or MONAI's `image`: the path
of a 4D file, or a list of paths in the data set's order of sequences, null where one is missing. Paths count from the list's folder.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mstkd.errors import UserError
from mstkd.shards.dataset import Case, DatasetSpec, Volume
from mstkd.shards.imported_splits import TEST_KEYS
from mstkd.shards.patterns import FilePattern
from mstkd.shards.spec import SUBJECT_KEY

SUBJECT, IMAGE, BRAIN_MASK = "subject", "image", "brain_mask"  # how they are called in a list
IGNORED = ("label", "fold")  # of MONAI's datalists: a truth is not looked at


def read_case_list(path: Path, dataset: DatasetSpec) -> tuple[list[Case], dict[str, str]]:
    """The cases in the order of the list, and by subject why others cannot be used.

    Raises UserError: unreadable, neither form, an unknown column or key, no or a repeated subject.
    """
    cases, problems = [], {}
    for number, item in enumerate(_items(path), 1):
        where = f"{path.name}: case {number}"
        subject, files, brain = _read_item(item, where, path.parent, dataset)
        if subject in problems or any(case.subject == subject for case in cases):
            raise UserError(f"{where}: subject {subject} is there twice; name each case once")
        if not files:
            problems[subject] = f"subject {subject}: no file of {', '.join(dataset.sequences)} in the list"
        elif dataset.brain_mask and brain is None:
            problems[subject] = f"subject {subject}: no {BRAIN_MASK} in the list, which data set {dataset.name} has"
        else:
            cases.append(Case(subject, subject, files, brain=brain))
    if not cases and not problems:
        raise UserError(f"{path}: lists no case")
    return cases, problems


def _items(path: Path) -> Sequence[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; give a folder, or a list as CSV or JSON") from None
    if path.suffix.lower() == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text), strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: not a CSV table ({error})") from None
    if path.suffix.lower() != ".json":
        raise UserError(f"{path}: neither a folder nor a list; name a list .csv or .json")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno} ({error.msg})") from None
    if isinstance(values, dict):
        values = next((values[key] for key in TEST_KEYS if key in values), None)
    if not isinstance(values, list) or not all(isinstance(item, dict) for item in values):
        raise UserError(f"{path}: expected a list of cases, or an object with one under {' or '.join(TEST_KEYS)}, as MONAI's datalists have")
    return values


def _read_item(item: dict[str, Any], where: str, root: Path, dataset: DatasetSpec) -> tuple[str, dict[str, Volume], Volume | None]:
    item = {key: value for key, value in item.items() if key not in IGNORED and value not in (None, "")}
    known = (SUBJECT, *([IMAGE] if IMAGE not in dataset.sequences else []), *dataset.sequences, BRAIN_MASK)
    if unknown := [key for key in item if key not in known]:
        raise UserError(f"{where}: {unknown[0]!r} is no sequence; known are {', '.join(known)}")
    if IMAGE in item and IMAGE not in dataset.sequences:
        item |= _split_image(item.pop(IMAGE), where, dataset)
    texts = {name: item[name] for name in dataset.sequences if item.get(name)}
    if strange := [text for text in (*texts.values(), item.get(BRAIN_MASK, "")) if not isinstance(text, str)]:
        raise UserError(f"{where}: {strange[0]!r} is not the path of a file")
    files = {name: Volume(root / text.strip(), _channel(name, text, item, dataset)) for name, text in texts.items()}
    subject = str(item.get(SUBJECT) or _subject(texts, dataset) or "").strip()
    if not SUBJECT_KEY.fullmatch(subject):
        raise UserError(f"{where}: {f'subject {subject!r} cannot be a key' if subject else 'no subject'}; give one of letters, digits, _ and -")
    return subject, files, Volume(root / item[BRAIN_MASK].strip()) if item.get(BRAIN_MASK) else None


def _split_image(image: Any, where: str, dataset: DatasetSpec) -> dict[str, Any]:
    names = list(dataset.sequences)
    paths = [image] * len(names) if isinstance(image, str) else image
    if not isinstance(paths, list) or len(paths) != len(names):
        raise UserError(f"{where}: {IMAGE} has to be the path of a 4D file, or a list of {len(names)}: {', '.join(names)}, null for a missing one")
    return dict(zip(names, paths, strict=True))


def _channel(name: str, text: str, item: dict[str, Any], dataset: DatasetSpec) -> int | None:
    """Where one file is given for all sequences, which channel of it; the data set's own, or its place."""
    if sum(item.get(other) == text for other in dataset.sequences) == 1:
        return None
    own = FilePattern.parse(dataset.sequences[name]).channel
    return list(dataset.sequences).index(name) if own is None else own


def _subject(texts: dict[str, str], dataset: DatasetSpec) -> str | None:
    """As the data set's file patterns tell it of the first file."""
    found = (subject for name, text in texts.items() for subject in FilePattern.parse(dataset.sequences[name]).subjects_of(text.strip()))
    return next(found, None)
