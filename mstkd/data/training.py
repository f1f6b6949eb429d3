"""What a run trains on: shard sets that agree, the training subjects of the fold, and their order."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mstkd.config import DataConfig
from mstkd.data.ahead import staged_ahead
from mstkd.data.order import Order
from mstkd.data.sample import Item
from mstkd.data.slices import SliceIndex, check_slices, find_slices
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.shards.spec import LABEL, Classification, SubjectEntry

log = logging.getLogger(__name__)

VOLUME_KEYS = ("crop", "slices", "crops", "foreground_share", "augment")  # of DataConfig: they say nothing about views
WINDOWS_AHEAD = 2  # the one being read and the next: its subjects are shuffled, so all of its tars are wanted almost at once


@dataclass
class TrainingSet:
    """Opened shard sets and the order of their training items; equal on every rank."""

    stores: list[ShardStore]
    order: Order
    seed: int
    dropped: list[str]  # training subjects left out: a sequence or the label is missing, or no slice qualifies

    @property
    def sequences(self) -> tuple[str, ...]:
        """Sequence names in channel order."""
        return self.stores[0].index.sequences

    @property
    def labelled(self) -> bool:
        """Whether every item has a label."""
        return self.stores[0].index.label_scheme is not None

    @property
    def classification(self) -> Classification | None:
        """The views and classes of sets for classification; None: they hold volumes."""
        return self.stores[0].index.classification

    def items(self, positions: Iterable[int]) -> Iterator[Item]:
        """The items at these positions of the stream, to be read in turn; staged tars are brought ahead of their use."""
        return staged_ahead(map(self.order.item, positions), self.stores, WINDOWS_AHEAD * self.order.window)


def open_store(place: str, config: DataConfig) -> ShardStore:
    """The shard set in a folder or at an address, staged, checked and shown as a recipe's `data:` section says."""
    return ShardStore(place, config.cache_dir, config.cache_gib, config.verify_sha256, config.synthetic == "hide")


def open_stores(config: DataConfig) -> list[ShardStore]:
    """The shard sets of a recipe. Raises UserError if they differ in sequences, label scheme or classes."""
    stores = [open_store(shards.path, config) for shards in config.shards]
    first = stores[0]
    for store in stores[1:]:
        for fact in ("sequences", "label_scheme", "classification"):
            ours, theirs = getattr(first.index, fact), getattr(store.index, fact)
            if ours != theirs:
                raise UserError(f"data.shards: {store.folder} has {fact} {theirs}, {first.folder} has {ours}; mixed sets must agree")
    return stores


def open_training(config: DataConfig, seed: int, complete_only: bool, slices: SliceIndex | None = None) -> TrainingSet:
    """The training set of a recipe's `data:` section.

    Subjects without a label in a labelled set, with `complete_only` those that lack a sequence, and with `data.slices`
    those of whom no slice qualifies, are dropped, counted and logged. Raises UserError on a wrong folder, fold or
    mixture, if no subject is left, or if the section is for volumes and the sets hold views, or the reverse.

    `slices`: what `training_slices` found, perhaps in another process; by default they are found here, see `find_slices`.
    """
    stores, sets, dropped = _open(config, complete_only)
    if dropped:
        log.warning("%d training subjects dropped, a sequence or the label is missing: %s", len(dropped), ", ".join(dropped))
        if not any(tar for tars in sets for tar in tars):
            lacks = "a sequence or the label; this method trains on complete subjects, monai_network for example on any" if complete_only else "the label"
            raise UserError(f"data.shards: each of the {len(dropped)} training subjects lacks {lacks}")
    if config.slices is not None:
        slices = find_slices(stores, sets, config) if slices is None else slices
        dropped += _without_slices(sets, slices)
        sets = [[[key for key in tar if found.get(key)] for tar in tars] for tars, found in zip(sets, slices, strict=True)]
    order = Order(sets, [shards.repeat for shards in config.shards], seed, config.shuffle_window, slices)
    return TrainingSet(stores, order, seed, dropped)


def training_slices(config: DataConfig, complete_only: bool) -> SliceIndex | None:
    """The axial slices that `open_training` trains on, to be found once and handed to every rank; None: none are asked for."""
    if config.slices is None:
        return None
    stores, sets, _ = _open(config, complete_only)
    return find_slices(stores, sets, config)


def _open(config: DataConfig, complete_only: bool) -> tuple[list[ShardStore], list[list[list[str]]], list[str]]:
    """The stores, the usable training subjects per set and tar, and those dropped."""
    stores = open_stores(config)
    _check_kind(config, stores[0])
    sets, dropped = [], []
    for store in stores:
        chosen = _training_subjects(store, config.fold)
        usable = {key for key in chosen if _usable(store.subjects[key], store, complete_only)}
        dropped += sorted(chosen - usable)
        sets.append([[entry.subject for entry in tar.subjects if entry.subject in usable] for tar in store.index.shards])
    return stores, sets, dropped


def _without_slices(sets: list[list[list[str]]], slices: SliceIndex) -> list[str]:
    """Subjects with no slice to train on; of those that could not be read it was said when they were."""
    chosen = [(key, found.get(key)) for tars, found in zip(sets, slices, strict=True) for tar in tars for key in tar]
    if empty := sorted(key for key, slices_of in chosen if slices_of == ()):
        log.warning("%d training subjects dropped, no axial slice of theirs meets data.slices: %s", len(empty), ", ".join(empty))
    return sorted(key for key, slices_of in chosen if not slices_of)


def _check_kind(config: DataConfig, store: ShardStore) -> None:
    if store.index.classification is None:
        if config.crop is None and config.slices is None:
            raise UserError(f"data.crop: missing, and {store.folder} holds volumes; give the training crop in voxels, e.g. [128, 128, 128]")
        if config.crop is not None and config.slices is not None:
            raise UserError("data.slices: given together with data.crop; remove one of them")
        if config.slices is not None:
            check_slices(config, store)
        return
    for key in VOLUME_KEYS:
        if getattr(config, key) != DataConfig.model_fields[key].default:
            raise UserError(f"data.{key}: is for volumes, and {store.folder} holds views of {' and '.join(store.index.sequences)}; remove the key")


def _training_subjects(store: ShardStore, fold: int) -> set[str]:
    chosen = set(store.fold(fold).train)
    if unknown := sorted(chosen - store.subjects.keys()):
        raise UserError(f"{store.folder / 'splits.json'}: fold {fold} names {unknown[0]}, which is not in index.json")
    return chosen


def _usable(entry: SubjectEntry, store: ShardStore, complete_only: bool) -> bool:
    labelled = store.index.label_scheme is None or LABEL in entry.members
    return labelled and (not complete_only or set(entry.sequences) == set(store.index.sequences))
