"""The cases of one or several shard sets, under one roof."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mstkd.data.sample import Sample, ViewSample
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.shards.spec import Classification, LabelScheme
from mstkd.subsets import Subset

SPLITS = ("test", "val", "train", "all")


class CaseSource:
    """Whole stored cases by subject key, from sets that agree in sequences and label scheme."""

    def __init__(self, stores: Sequence[ShardStore]):
        """Raises UserError if two sets hold the same subject key."""
        self.stores = list(stores)
        self._store_of: dict[str, ShardStore] = {}
        for store in self.stores:
            for subject in store.subjects:
                if subject in self._store_of:
                    raise UserError(f"subject {subject} is in {self._store_of[subject].folder} and in {store.folder}; subject keys must differ between sets")
                self._store_of[subject] = store

    @property
    def sequences(self) -> tuple[str, ...]:
        return self.stores[0].index.sequences

    @property
    def label_scheme(self) -> LabelScheme | None:
        return self.stores[0].index.scheme

    @property
    def classification(self) -> Classification | None:
        """The views and classes of sets for classification; None: they hold volumes."""
        return self.stores[0].index.classification

    @property
    def dataset(self) -> str:
        """Names of the data sets, joined by "+"."""
        return "+".join(store.index.dataset for store in self.stores)

    @property
    def digest(self) -> str:
        """sha256 over what the sets' indices say, and over which sequences of each case are shown."""
        digest = hashlib.sha256()
        for store in self.stores:
            digest.update(store.index.model_dump_json().encode())
            digest.update(json.dumps({key: entry.sequences for key, entry in store.subjects.items()}).encode())
        return digest.hexdigest()

    def subject(self, key: str) -> Sample | ViewSample:
        """One stored case."""
        return self._store_of[key].subject(key)

    def file_label(self, key: str) -> NDArray[np.uint8] | None:
        """Of a case that was resampled: its label on the grid and in the axes of its file."""
        return self._store_of[key].file_label(key)

    def subjects(self, split: str, fold: int = 0) -> list[str]:
        """Keys of a split: "test", "val" or "train" of the fold, or "all". Raises UserError if there is no such split."""
        return [key for store in self.stores for key in split_subjects(store, split, fold)]

    def having(self, subset: Subset, subjects: Sequence[str]) -> list[str]:
        """Those of `subjects` that have every sequence of `subset`."""
        wanted = {name for name, there in zip(self.sequences, subset, strict=True) if there}
        return [key for key in subjects if wanted <= {*self._store_of[key].subjects[key].sequences}]

    def complete(self, subjects: Sequence[str]) -> list[str]:
        """Those of `subjects` that have every sequence."""
        return self.having((True,) * len(self.sequences), subjects)


def split_subjects(store: ShardStore, split: str, fold: int = 0) -> tuple[str, ...]:
    """Keys of one set's split. Raises UserError if there is no such split."""
    if split not in SPLITS:
        raise UserError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    if split == "all":
        return tuple(store.subjects)
    chosen = getattr(store.fold(fold), split)
    return (*store.splits.test, *chosen) if split == "test" else chosen
