"""Splits made elsewhere: our own splits.json, nnU-Net's splits_final.json, MONAI datalists."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mstkd.errors import UserError
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.patterns import ON_DISK
from mstkd.shards.spec import Fold, Splits

MAX_NAMED = 5  # items that one message names
PICKLE = b"\x80"  # how one begins
FORMS = "a splits.json with folds and test, nnU-Net's splits_final.json, or a MONAI datalist with training"
TEST_KEYS = ("testing", "test")


def import_splits(path: Path, subjects: dict[str, str], dataset: DatasetSpec | None = None) -> Splits:
    """The splits in `path`, whichever of the three forms it has; not checked against the data set beyond file names.

    `subjects` has the data set's subject keys. The files of a MONAI datalist are told apart by the file patterns of
    `dataset`; without it by their own name or their folder's. Raises UserError: unreadable, none of the forms, files
    that fit no subject.
    """
    if not path.is_file():
        raise UserError(f"splits {path}: no such file")
    content = path.read_bytes()
    if content.startswith(PICKLE):
        raise UserError(f"splits {path}: a pickle, which is never opened; nnU-Net version 2 writes splits_final.json")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"splits {path}: Invalid JSON: {str(error) or 'too deeply nested'}") from None
    if isinstance(values, list):
        return Splits(folds=_validated(tuple[Fold, ...], values, path, "fold "))
    if isinstance(values, dict) and "folds" in values:
        return _validated(Splits, values, path)
    if isinstance(values, dict) and "training" in values:
        return _Datalist(path, values, subjects, dataset).splits()
    raise UserError(f"splits {path}: none of the known forms: {FORMS}")


def _validated(form: Any, values: Any, path: Path, prefix: str = "") -> Any:
    try:
        return TypeAdapter(form).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"splits {path}: {prefix}{key + ': ' if key else ''}{problem['msg']}") from None


class _Datalist:
    """A MONAI datalist: items with file paths under training, each with a fold number or beside a validation list."""

    def __init__(self, path: Path, values: dict, subjects: dict[str, str], dataset: DatasetSpec | None):
        self.path, self.values, self.subjects = path, values, subjects
        below = "{subject}/" if dataset and dataset.layout == "folders" else ""
        self.patterns = [replace(pattern, stem=below + pattern.stem) for pattern in dataset.patterns()] if dataset else []

    def splits(self) -> Splits:
        training, test_key = self._items("training"), next((key for key in TEST_KEYS if key in self.values), None)
        folds = [item.get("fold") if isinstance(item, dict) else None for item in training]
        keys = self._keys("training", training)
        validation = self._keys("validation", self._items("validation")) if self.values.get("validation") else ()
        test = self._keys(test_key, self._items(test_key)) if test_key else ()
        numbered = [fold is not None for fold in folds]
        if any(numbered) and validation:
            raise UserError(f"splits {self.path}: has both fold numbers and a validation list; remove one of them")
        if validation:
            return Splits(folds=(Fold(train=keys, val=validation),), test=test)
        if not any(numbered):
            raise UserError(f"splits {self.path}: neither fold numbers under training nor a validation list; add one of them")
        if not all(numbered) or any(type(fold) is not int for fold in folds):
            wrong = next(number for number, fold in enumerate(folds) if type(fold) is not int)
            raise UserError(f"splits {self.path}: training.{wrong}: has no fold number, as others have; give fold: 0, 1, ...")
        return Splits(folds=tuple(_fold(keys, folds, number) for number in sorted(set(folds))), test=test)

    def _items(self, key: str) -> list:
        items = self.values[key]
        if not isinstance(items, list):
            raise UserError(f"splits {self.path}: {key}: expected a list of items")
        return items

    def _keys(self, name: str, items: list) -> tuple[str, ...]:
        """The subject of each item; UserError naming the items whose files fit none, or more than one."""
        found = [self._known(item) for item in items]
        for number, fitting in enumerate(found):
            if len(fitting) > 1:
                both = " and ".join(sorted(fitting))
                raise UserError(f"splits {self.path}: {name}.{number}: its files fit the subjects {both}; keep one's files")
        if unknown := [number for number, fitting in enumerate(found) if not fitting]:
            shown = ", ".join(f"{name}.{number} ({_shown(items[number])})" for number in unknown[:MAX_NAMED])
            more = f", ... ({len(unknown)} in all)" if len(unknown) > MAX_NAMED else ""
            fix = "take it off the list or correct the spec"
            raise UserError(f"splits {self.path}: {shown}{more}: no subject of the data set has such a file; {fix}")
        return tuple(fitting.pop() for fitting in found)

    def _known(self, item: Any) -> set[str]:
        """The subjects of the data set that an item's files fit."""
        candidates = (subject for file in _paths(item) for subject in self._candidates(file))
        return {subject for subject in candidates if subject in self.subjects}

    def _candidates(self, file: str) -> Iterator[str]:
        if not self.patterns:
            yield from (_without_ending(file.rpartition("/")[2]), file.rpartition("/")[0].rpartition("/")[2])
        for pattern in self.patterns:
            yield from pattern.subjects_of(file)


def _fold(keys: tuple[str, ...], folds: list[int], number: int) -> Fold:
    of_fold = list(zip(keys, folds))
    return Fold(train=tuple(key for key, fold in of_fold if fold != number), val=tuple(key for key, fold in of_fold if fold == number))


def _paths(item: Any) -> Iterator[str]:
    """All file paths in an item: a path itself, or an object of paths and lists of paths."""
    if isinstance(item, str):
        if item.endswith(tuple(ON_DISK)):
            yield item.replace("\\", "/")
    elif isinstance(item, dict | list):
        for value in item.values() if isinstance(item, dict) else item:
            yield from _paths(value)


def _shown(item: Any) -> str:
    return next(_paths(item), "no file path")


def _without_ending(name: str) -> str:
    return next((name.removesuffix(ending) for ending in ON_DISK if name.endswith(ending)), name)
