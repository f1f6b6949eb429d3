"""Axial slices of stored volumes: which ones are trained on, and reading one without the rest of its volume."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from mstkd.config import DataConfig, SliceConfig
from mstkd.data.ahead import staged_ahead
from mstkd.data.planes import Plane
from mstkd.data.sample import Item, Sample
from mstkd.data.store import BadSample, ShardStore
from mstkd.errors import UserError

log = logging.getLogger(__name__)

SliceIndex = list[dict[str, tuple[int, ...]]]  # per shard set: subject -> the k of its slices [..., k], rising
TARS_AHEAD = 2  # staged: the one being read and the next


def check_slices(config: DataConfig, store: ShardStore) -> None:
    """Raise UserError where `data.slices` asks for what the set, or a slice, does not have."""
    if config.foreground_share:
        raise UserError("data.foreground_share: places crops of volumes, and data.slices takes whole slices; remove the key, or see data.slices.region")
    region, scheme = config.slices.region, store.index.scheme
    if region is None:
        return
    if scheme is None:
        raise UserError(f"data.slices.region {region}: {store.folder} has no labels; remove the key")
    if region not in scheme.regions:
        raise UserError(f"data.slices.region {region}: label scheme {scheme.name} of {store.folder} has only {', '.join(scheme.regions)}; remove the key")


def find_slices(stores: Sequence[ShardStore], sets: Sequence[Sequence[Sequence[str]]], config: DataConfig) -> SliceIndex:
    """The slices that qualify for training, per shard set and subject; () where a subject has none. `sets` as in `Order`.

    Reads each training subject's brain mask, with `region` its label too, and no image: the time grows with the number
    of subjects times their voxels, one or two bytes each (5 and 40 ms for a BraTS subject in the page cache). Of a set
    that is staged, every tar with such a subject is staged once. With `on_bad_sample: skip` subjects that cannot be decoded
    are logged and not in the index. Raises UserError if there are more than `max_bad_samples` of them, or if no slice qualifies.
    """
    found: SliceIndex = [{} for _ in stores]
    bad, any_brain = [], False
    items = (Item(0, source, subject) for source, tars in enumerate(sets) for tar in tars for subject in tar)
    for item in staged_ahead(items, stores, TARS_AHEAD):
        try:
            brain, chosen = _qualifying(stores[item.source], item.subject, config.slices)
        except BadSample as error:
            if config.on_bad_sample == "stop":
                raise UserError(f"{error}; or data.on_bad_sample=skip leaves such subjects out") from None
            bad.append(str(error))
            if len(bad) > config.max_bad_samples:
                raise UserError(f"data.max_bad_samples {config.max_bad_samples}: more subjects than that cannot be read, the last one: {error}") from None
            log.warning("subject left out: %s", error)
            continue
        found[item.source][item.subject] = chosen
        any_brain |= bool(brain)
    if any(chosen for slices in found for chosen in slices.values()) or not (bad or any(found)):
        return found
    raise UserError(_what_to_relax(config.slices, sum(map(len, found)), any_brain, bad))


def read_slice(volume: Sample, k: int, plane: Plane) -> Sample:
    """Slice k of a stored volume in its padded plane, as a volume of one voxel along Z: (M, N, N, 1), a copy in the types stored.

    One value of every row along Z is read: no volume is unpacked, but its pages pass through the page cache, which
    should hold the volumes of `data.shuffle_window` tars.
    """

    def cut(stored: np.ndarray) -> np.ndarray:
        return plane.pad(torch.from_numpy(stored[..., k].copy()), 0).numpy()[..., None]

    return Sample(cut(volume.image), cut(volume.brain), None if volume.label is None else cut(volume.label), volume.meta)


def _qualifying(store: ShardStore, subject: str, config: SliceConfig) -> tuple[int, tuple[int, ...]]:
    """How many slices of a subject have brain enough, and those of them that show the region. Raises BadSample."""
    sample = store.subject(subject)
    plane = _plane(sample, store, config)
    chosen = np.flatnonzero(np.count_nonzero(sample.brain, axis=(0, 1)) / plane.side**2 >= config.min_brain)
    brain = len(chosen)
    if config.region is not None:
        inside = np.isin(sample.label[..., chosen], store.index.scheme.regions[config.region])
        pixels = plane.bring_labels(torch.from_numpy(inside).movedim(-1, 0)).sum((-2, -1)).numpy()
        chosen = chosen[pixels >= config.min_region_pixels]
    return brain, tuple(chosen.tolist())


def _plane(sample: Sample, store: ShardStore, config: SliceConfig) -> Plane:
    meta = sample.meta
    try:
        plane = Plane.of(meta, config.size, config.fit)
        fits = plane.shape == sample.brain.shape[:2] and all(stop <= n for (_, stop), n in zip(meta.crop_box, meta.ras_shape, strict=True))
    except (KeyError, ValueError):  # no orientation
        fits = False
    if not fits:
        place = store.folder / store.tar_of(meta.subject).file
        raise BadSample(f"{place}: subject {meta.subject}: crop_box does not fit its volume or its grid; run `mstkd shards verify {store.folder}`")
    return plane


def _what_to_relax(config: SliceConfig, subjects: int, any_brain: bool, bad: list[str]) -> str:
    if not subjects:
        return f"data.shards: no training subject can be read, the last one: {bad[-1]}"
    if not any_brain:
        return f"data.slices.min_brain {config.min_brain:g}: no slice of the {subjects} training subjects has so much brain; lower it"
    return (
        f"data.slices.min_region_pixels {config.min_region_pixels}: no slice of the {subjects} training subjects shows so much of {config.region} "
        f"at {config.size} pixels per axis; lower it, or remove data.slices.region"
    )
