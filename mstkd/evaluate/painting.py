"""Whole volumes that a segmentation method's networks paint, against the true ones: PSNR and SSIM, data range 1."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.sharing import shared_out
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.synthesis import psnr, ssim

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Painting:
    """How like the true volume a painted one is, over the brain's box; both clipped to [0, 1]."""

    network: str
    subject: str
    psnr: float  # dB
    ssim: float


def score_paintings(
    predictor: Predictor, network: str, source: CaseSource, subjects: Sequence[str], rank: int = 0, world: int = 1,
    stopping: Callable[[], bool] | None = None,
) -> list[Painting]:  # fmt: skip
    """Scores of the `subjects` that have the painted sequence, the same on every rank and for any number of ranks.

    Everything that a subject has is visible. Collective with several ranks. `stopping` as in `shared_out`.
    """
    channel = predictor.method.painted(network)
    known = [key for key in subjects if predictor.sequences[channel] in source.subject(key).meta.sequences]

    def scores(number: int) -> list[Painting]:
        sample = source.subject(known[number])
        volume = predictor.volume(sample.image, sample.brain, sample.meta)
        made = predictor.scores(network, volume, volume.present)[0].clamp(0, 1).cpu().numpy()
        truth = volume.image[0, channel][volume.inner].clamp(0, 1).cpu().numpy()
        log.info("scored %s (%d of %d)", known[number], number + 1, len(known))
        return [Painting(network, known[number], psnr(made, truth), ssim(made, truth))]

    with evaluation_mode(predictor.method):
        return shared_out(len(known), scores, rank, world, stopping)
