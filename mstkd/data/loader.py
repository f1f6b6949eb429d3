"""The training loader: the same sequence of batches for every rank and worker count.

    positions of this rank's micro-batches (strided over workers)
      -> read: item -> byte range -> crop or slice as stored  (a bad sample is replaced here, or stops the run)
      -> geometry                                             (as all draws, seeded by (seed, item))
      -> normalise, intensity, straight into few large shared tensors -> the training process
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from mstkd.batch import Batch, ViewBatch
from mstkd.config import DataConfig
from mstkd.data.augment import augment_geometry, augment_intensity
from mstkd.data.availability import Availability
from mstkd.data.crop import Foreground, crop
from mstkd.data.intensity import Intensity
from mstkd.data.planes import Plane
from mstkd.data.sample import Item, Sample, ViewSample, item_rng
from mstkd.data.slices import read_slice
from mstkd.data.store import BadSample, ShardStore
from mstkd.data.training import TrainingSet
from mstkd.data.workers import checked, errors_as_data, leave_signals_to_the_trainer, shared_tensor, watched
from mstkd.errors import UserError

log = logging.getLogger(__name__)

BLOCK_VOXELS = 2**16  # per sequence, normalised at a time


@dataclass(frozen=True)
class Share:
    """Which micro-batches of the stream one rank takes: j = a x world + rank for a in range(accumulation)."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int
    start_step: int
    total_steps: int

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world)

    def micro_batches(self) -> Iterator[tuple[int, int]]:
        """(j, position of its first item in the endless stream), in the order of training."""
        for step in range(self.start_step, self.total_steps):
            for a in range(self.accumulation):
                j = a * self.world + self.rank
                yield j, step * self.global_batch + j * self.micro_batch

    def positions(self, worker: int = 0, workers: int = 1) -> Iterator[int]:
        """What one of the rank's workers reads: every n-th micro-batch, which is the order in which the loader asks them."""
        for _, position in islice(self.micro_batches(), worker, None, workers):
            yield from range(position, position + self.micro_batch)


@dataclass
class Drawn:
    """A sample on its way: `item` owns the draws; `shown` is another one if that replaces a bad sample."""

    item: Item
    shown: Item
    sample: Sample | ViewSample
    bad: list[str] = field(default_factory=list)  # messages of the samples skipped on the way here

    @property
    def subject(self) -> str:
        return self.shown.subject


class Stages:
    """The stages between positions and batches, run in a worker process."""

    axial = False  # True: samples are single slices, (M, X, Y, 1)

    def __init__(self, training: TrainingSet, config: DataConfig, intensity: Intensity, share: Share):
        self.training, self.config, self.intensity, self.share = training, config, intensity, share
        self.availability = Availability(config.availability, training.sequences)
        self._foregrounds = [Foreground() for _ in training.stores]

    def pipeline(self) -> webdataset.DataPipeline:
        """An iterable data set of collated micro-batches."""
        return webdataset.DataPipeline(self.items, webdataset.map(self.take), self.batches, errors_as_data)

    def items(self) -> Iterator[Item]:
        """This worker's items."""
        worker = get_worker_info()
        return self.training.items(self.share.positions(worker.id, worker.num_workers) if worker else self.share.positions())

    def take(self, item: Item) -> Drawn:
        """The item's crop, moved as the augmentation says: a function of (seed, item) alone; availability is drawn apart."""
        with self._naming(item):
            return self.geometry(self.read(item))

    def read(self, item: Item) -> Drawn:
        """The item's crop; while the subject cannot be decoded, another one drawn by the item takes its place."""
        substitutes = self._draws(item, "substitute")
        candidate, bad = item, []
        while True:
            try:
                return Drawn(item, candidate, self.stored(item, candidate), bad)
            except BadSample as error:
                if self.config.on_bad_sample == "stop":
                    raise UserError(f"{error}; or data.on_bad_sample=skip replaces such samples") from None
                bad.append(str(error))
                if len(bad) > self.config.max_bad_samples:
                    raise UserError(too_many_bad(self.config, bad[-1])) from None
            items = self.training.order.epoch(self._settled(item).epoch)
            candidate = items[substitutes.integers(len(items))]

    def geometry(self, drawn: Drawn) -> Drawn:
        config, sample = self.config.augment, drawn.sample
        if config.rotate_deg or config.zoom:  # interpolation in float32; a flip may stay in the type stored
            sample = replace(sample, image=_float32(sample.image))
        draws = self._draws(drawn.item, "geometry")
        return replace(drawn, sample=augment_geometry(sample, config, draws, self.axial))

    def normalise(self, drawn: Drawn, out: np.ndarray) -> None:
        """The method's intensities, augmented, into `out` (M, X, Y, Z) float32."""
        self.to_intensities(drawn.sample, out)
        self.augment_intensities(drawn, drawn.sample.brain, out)

    def to_intensities(self, sample: Sample, out: np.ndarray) -> None:
        """The method's intensities into `out`, float32 of the image's shape."""
        sequences = self.training.sequences
        planes = max(1, BLOCK_VOXELS // sample.brain[0].size)
        for start in range(0, len(sample.brain), planes):  # voxel by voxel anyhow: so it stays in the processor's cache
            block = slice(start, start + planes)
            out[:, block] = self.intensity.apply(_float32(sample.image[:, block]), sample.brain[block], sample.meta, sequences)

    def augment_intensities(self, drawn: Drawn, brain: np.ndarray, out: np.ndarray) -> None:
        """Augments `out`, (M, ...), where `brain` of the same shape without M is not 0."""
        draws = self._draws(drawn.item, "intensity")
        present = np.array(_present(drawn.sample, self.training.sequences))
        augmented = augment_intensity(out, brain, present, self.config.augment, draws)
        if augmented is not out:
            out[...] = augmented

    def batches(self, stream: Iterator[Drawn]) -> Iterator[dict]:
        """Collated micro-batches: the fields of a Batch or ViewBatch as plain data, and the messages of skipped samples."""
        while (fields := self._micro_batch(stream)) is not None:
            yield fields

    def _micro_batch(self, stream: Iterator[Drawn]) -> dict | None:
        size, training = self.share.micro_batch, self.training
        fields: dict = {}
        for place, drawn in enumerate(islice(stream, size)):
            if not fields:
                fields = self._empty(size)
            present = _present(drawn.sample, training.sequences)
            with self._naming(drawn.item):
                self.fill(fields, place, drawn)
            fields["present"].append(present)
            fields["available"].append(self.availability.draw(training.seed, drawn.item, present, drawn.shown))
            fields["subject"].append(drawn.subject)
            fields["bad"] += drawn.bad
            drawn.sample = None  # the pipeline holds on to `drawn` until it has the next one
        return fields or None

    def fill(self, fields: dict, place: int, drawn: Drawn) -> None:
        """Put a sample's arrays into the tensors of a micro-batch."""
        self.normalise(drawn, fields["image"][place].numpy())
        fields["brain"][place] = torch.from_numpy(drawn.sample.brain)
        if self.training.labelled:
            fields["label"][place] = torch.from_numpy(drawn.sample.label)

    def _empty(self, size: int) -> dict:
        return {**self.tensors(size), "present": [], "available": [], "subject": [], "bad": []}

    def tensors(self, size: int) -> dict:
        """Those that `fill` fills, for `size` samples."""
        return {
            "image": shared_tensor((size, len(self.training.sequences), *self.shape), torch.float32),
            "brain": shared_tensor((size, *self.shape), torch.bool),
            "label": shared_tensor((size, *self.shape), torch.uint8) if self.training.labelled else None,
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample's image in the batch, without its sequences."""
        return self.config.crop

    def stored(self, item: Item, candidate: Item) -> Sample:
        """The item's crop of the candidate's volume. Raises BadSample."""
        store = self.training.stores[candidate.source]
        draws = self._draws(item, "crop")
        foreground = self._foregrounds[candidate.source]
        sample = crop(self.whole(store, candidate.subject), self.config.crop, self.config.foreground_share, draws, foreground)
        _check_finite(sample.image, store, candidate.subject)
        return sample

    def whole(self, store: ShardStore, subject: str) -> Sample:
        """A subject as stored, with the image that the method's intensities are made from. Raises BadSample."""
        sample = store.subject(subject)
        return replace(sample, image=store.equalised(subject)) if self.intensity.config.kind == "clahe" else sample

    def _settled(self, item: Item) -> Item:
        """The item that draws for this one: with `crops: fixed` that of the first epoch, so that its image is the same in all."""
        return replace(item, epoch=0) if self.config.crops == "fixed" else item

    def _draws(self, item: Item, purpose: str) -> np.random.Generator:
        return item_rng(self.training.seed, self._settled(item), purpose)

    @contextmanager
    def _naming(self, item: Item) -> Iterator[None]:
        """What fails unforeseen says at which subject."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"(at subject {item.subject} of {self.training.stores[item.source].folder})")
            raise


class SliceStages(Stages):
    """The same for axial slices: moved and normalised in the padded plane of the file, then brought to the networks' size."""

    axial = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.slices.size,) * 2

    def stored(self, item: Item, candidate: Item) -> Sample:
        store = self.training.stores[candidate.source]
        volume = self.whole(store, candidate.subject)
        sample = read_slice(volume, candidate.slice_index, self._plane(volume))
        _check_finite(sample.image, store, candidate.subject)
        return sample

    def fill(self, fields: dict, place: int, drawn: Drawn) -> None:
        sample, plane = drawn.sample, self._plane(drawn.sample)
        image = np.empty(sample.image.shape, np.float32)
        self.to_intensities(sample, image)
        fields["image"][place] = plane.resample(torch.from_numpy(image)[..., 0])
        fields["brain"][place] = plane.resample_labels(torch.from_numpy(sample.brain)[..., 0])
        if self.training.labelled:
            fields["label"][place] = plane.resample_labels(torch.from_numpy(sample.label)[..., 0])
        # on the pixels that networks see: resampling would average the noise away
        self.augment_intensities(drawn, fields["brain"][place].numpy(), fields["image"][place].numpy())

    def _plane(self, sample: Sample) -> Plane:
        return Plane.of(sample.meta, self.config.slices.size, self.config.slices.fit)


class ViewStages(Stages):
    """The same for a set of views: they are stored as networks take them."""

    def stored(self, item: Item, candidate: Item) -> ViewSample:
        store = self.training.stores[candidate.source]
        sample = store.subject(candidate.subject)
        _check_finite(sample.views.values(), store, candidate.subject)
        return sample

    def geometry(self, drawn: Drawn) -> Drawn:
        return drawn

    def tensors(self, size: int) -> dict:
        views = {name: shared_tensor((size, *shape), torch.float32) for name, shape in self.training.classification.views.items()}
        return {"views": views, "label": shared_tensor((size,), torch.int64)}

    def fill(self, fields: dict, place: int, drawn: Drawn) -> None:
        for name, tensor in fields["views"].items():
            view = drawn.sample.views.get(name)
            tensor[place] = self.intensity.hidden_value if view is None else torch.tensor(view)
        fields["label"][place] = drawn.sample.label


class TrainLoader:
    """Iterates over global steps `start_step .. total_steps - 1`; yields this rank's micro-batches of each step.

    A step is a list of (j, Batch), j the micro-batch's index in the global batch. Workers prefetch across steps.
    `bad_samples` counts the samples that this rank skipped since it was made; the trainer counts those of a whole stage.
    """

    def __init__(
        self,
        training: TrainingSet,
        config: DataConfig,
        intensity: Intensity,
        *,
        global_batch: int,
        micro_batch: int,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        """`global_batch` is a multiple of world x micro_batch, see `TrainConfig.accumulation`."""
        self.bad_samples = 0
        self._config, self._stores = config, training.stores
        self._hidden_value = intensity.hidden_value
        self._share = Share(global_batch, micro_batch, rank, world, start_step, total_steps)
        stages = ViewStages if training.classification is not None else SliceStages if config.slices is not None else Stages
        self._loader = DataLoader(
            stages(training, config, intensity, self._share).pipeline(),
            batch_size=None,  # the pipeline collates, in the worker
            num_workers=config.workers,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws from the global generator
        )

    def __iter__(self) -> Iterator[list[tuple[int, Batch | ViewBatch]]]:
        """Raises UserError when a sample is bad and may not be skipped, or one too many was; WorkerError if a process dies."""
        step = []
        for (j, _), fields in zip(self._share.micro_batches(), watched(self._loader, self._changed_tars), strict=True):
            step.append((j, self._batch(fields)))
            if len(step) == self._share.accumulation:
                yield step
                step = []

    def _batch(self, fields: dict) -> Batch | ViewBatch:
        bad = checked(fields).pop("bad")
        for message in bad:
            log.warning("sample skipped and replaced: %s", message)
        self.bad_samples += len(bad)
        if self.bad_samples > self._config.max_bad_samples:
            raise UserError(too_many_bad(self._config, bad[-1]))
        masks = {name: torch.tensor(fields.pop(name)) for name in ("present", "available")}
        return (ViewBatch if "views" in fields else Batch)(**fields, **masks, hidden_value=self._hidden_value)

    def _changed_tars(self) -> list[str]:
        """One line for each local tar whose size is no longer the index's."""
        return [
            f"{path} was cut while it was read: {size} of {tar.bytes} bytes are left; copy or build the shard set again"
            for store in self._stores
            for tar in store.index.shards
            if isinstance(path := store.folder / tar.file, Path) and (size := _size(path)) != tar.bytes
        ]


def _float32(image: np.ndarray) -> np.ndarray:
    return torch.from_numpy(image).float().numpy()  # exact, and several times faster than NumPy's astype


def _check_finite(stored: Iterable[np.ndarray], store: ShardStore, subject: str) -> None:
    if not all(_finite(part) for part in stored):
        place = store.folder / store.tar_of(subject).file
        raise BadSample(f"{place}: subject {subject} has values that are not finite; run `mstkd shards verify {store.folder}`")


def _finite(stored: np.ndarray) -> bool:
    """Whether no float16 value is inf or NaN: their exponent bits are all set. NumPy's isfinite is ten times slower here."""
    return not ((stored.view(np.uint16) & 0x7C00) == 0x7C00).any()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _present(sample: Sample | ViewSample, sequences: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(sequence in sample.meta.sequences for sequence in sequences)


def too_many_bad(config: DataConfig, message: str) -> str:
    """What ends a run; `message` is about the newest bad sample."""
    return f"data.max_bad_samples {config.max_bad_samples}: more samples than that were skipped, the last one: {message}"
