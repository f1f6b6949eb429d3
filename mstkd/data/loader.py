"""The training loader: the same sequence of batches for every rank and worker count.

    positions of this rank's micro-batches (strided over workers)
      -> read: item -> byte range -> crop, float32           (a bad sample is replaced here)
      -> geometry -> normalise -> intensity                   (all seeded by (seed, item))
      -> collate into few large tensors -> the training process
"""

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from mstkd.batch import Batch
from mstkd.config import DataConfig
from mstkd.data.augment import augment_geometry, augment_intensity
from mstkd.data.availability import draw
from mstkd.data.crop import crop
from mstkd.data.intensity import Intensity
from mstkd.data.sample import Item, Sample, item_rng
from mstkd.data.store import BadSample
from mstkd.data.training import TrainingSet
from mstkd.errors import UserError

log = logging.getLogger(__name__)


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


@dataclass
class Drawn:
    """A sample on its way: `item` owns the draws; `subject` differs from the item's if it replaces a bad one."""

    item: Item
    subject: str
    sample: Sample
    bad: list[str] = field(default_factory=list)  # messages of the samples skipped on the way here


class Stages:
    """The stages between positions and batches, run in a worker process."""

    def __init__(self, training: TrainingSet, config: DataConfig, intensity: Intensity, share: Share):
        self.training, self.config, self.intensity, self.share = training, config, intensity, share

    def pipeline(self) -> webdataset.DataPipeline:
        """An iterable data set of collated micro-batches."""
        return webdataset.DataPipeline(
            self.items,
            webdataset.map(self.read),
            webdataset.map(self.geometry),
            webdataset.map(self.normalise),
            self.batches,
            _errors_as_data,
        )

    def items(self) -> Iterator[Item]:
        """This worker's items: every n-th micro-batch, which is the order in which the loader asks its workers."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for _, position in islice(self.share.micro_batches(), first, None, stride):
            for offset in range(self.share.micro_batch):
                yield self.training.order.item(position + offset)

    def read(self, item: Item) -> Drawn:
        """The item's crop; while the subject cannot be decoded, another one drawn by the item takes its place."""
        substitutes = item_rng(self.training.seed, item, "substitute")
        candidate, bad = item, []
        while True:
            try:
                return Drawn(item, candidate.subject, self._crop(item, candidate), bad)
            except BadSample as error:
                bad.append(str(error))
                if len(bad) > self.config.max_bad_samples:
                    raise UserError(_too_many(self.config, bad)) from None
            items = self.training.order.epoch(item.epoch)
            candidate = items[substitutes.integers(len(items))]

    def geometry(self, drawn: Drawn) -> Drawn:
        draws = item_rng(self.training.seed, drawn.item, "geometry")
        return replace(drawn, sample=augment_geometry(drawn.sample, self.config.augment, draws))

    def normalise(self, drawn: Drawn) -> Drawn:
        sample, sequences = drawn.sample, self.training.sequences
        image = self.intensity.apply(sample.image, sample.brain, sample.meta, sequences)
        draws = item_rng(self.training.seed, drawn.item, "intensity")
        present = np.array(_present(sample, sequences))
        image = augment_intensity(image, sample.brain, present, self.config.augment, draws)
        return replace(drawn, sample=replace(sample, image=image))

    def batches(self, stream: Iterator[Drawn]) -> Iterator[dict]:
        """Collated micro-batches: the fields of a Batch as plain data, and the messages of skipped samples."""
        while group := list(islice(stream, self.share.micro_batch)):
            samples = [drawn.sample for drawn in group]
            present = [_present(sample, self.training.sequences) for sample in samples]
            available = [draw(self.training.seed, drawn.item, p) for drawn, p in zip(group, present, strict=True)]
            yield {
                "image": torch.from_numpy(np.stack([sample.image for sample in samples])),
                "brain": torch.from_numpy(np.stack([sample.brain for sample in samples]).astype(bool)),
                "present": torch.tensor(present),
                "available": torch.tensor(available),
                "subject": [drawn.subject for drawn in group],
                "label": torch.from_numpy(np.stack([sample.label for sample in samples])) if self.training.labelled else None,
                "bad": [message for drawn in group for message in drawn.bad],
            }

    def _crop(self, item: Item, candidate: Item) -> Sample:
        store = self.training.stores[candidate.source]
        draws = item_rng(self.training.seed, item, "crop")
        sample = crop(store.subject(candidate.subject), self.config.crop, self.config.foreground_share, draws)
        if not np.isfinite(sample.image).all():
            raise BadSample(f"{store.folder}: subject {candidate.subject} has voxels that are not finite; run `mstkd shards verify {store.folder}`")
        return sample


class TrainLoader:
    """Iterates over global steps `start_step .. total_steps - 1`; yields this rank's micro-batches of each step.

    A step is a list of (j, Batch), j the micro-batch's index in the global batch. Workers prefetch across steps.
    `bad_samples` counts the samples that this rank skipped; set it when a run resumes.
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
        self._config = config
        self._hidden_value = intensity.hidden_value
        self._share = Share(global_batch, micro_batch, rank, world, start_step, total_steps)
        self._loader = DataLoader(
            Stages(training, config, intensity, self._share).pipeline(),
            batch_size=None,  # the pipeline collates, in the worker
            num_workers=config.workers,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws from the global generator
        )

    def __iter__(self) -> Iterator[list[tuple[int, Batch]]]:
        """Raises UserError when more than `max_bad_samples` samples had to be skipped."""
        step = []
        for (j, _), fields in zip(self._share.micro_batches(), self._loader, strict=True):
            step.append((j, self._batch(fields)))
            if len(step) == self._share.accumulation:
                yield step
                step = []

    def _batch(self, fields: dict) -> Batch:
        if "error" in fields:
            raise UserError(fields["error"])
        bad = fields.pop("bad")
        for message in bad:
            log.warning("sample skipped and replaced: %s", message)
        self.bad_samples += len(bad)
        if self.bad_samples > self._config.max_bad_samples:
            raise UserError(_too_many(self._config, bad))
        return Batch(**fields, hidden_value=self._hidden_value)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """SLURM and terminals signal every process of a job; workers must live until the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # only the first: the interpreter ends its workers with SIGTERM when it exits
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _present(sample: Sample, sequences: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(sequence in sample.meta.sequences for sequence in sequences)


def _too_many(config: DataConfig, bad: list[str]) -> str:
    return f"data.max_bad_samples {config.max_bad_samples}: more samples than that were skipped, the last one: {bad[-1]}"


def _errors_as_data(stream: Iterator[dict]) -> Iterator[dict]:
    """Hands a user error over as an item: the loader would wrap it in the worker's traceback."""
    try:
        yield from stream
    except UserError as error:
        yield {"error": str(error)}
