"""Whole volumes that a segmentation method's networks paint, against the true ones: PSNR and SSIM."""

from collections.abc import Callable, Sequence

from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.kept import KeptScores
from mstkd.evaluate.sharing import score_each
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.synthesis import IDENTICAL_DB, Completion, Likeness, psnr, ssim
from mstkd.subsets import parse_subset

CONVENTIONS = {
    "images": "whole volumes in the box round the brain, painted and true, in the method's intensities, clipped to [0, 1]",
    "psnr": f"10 log10(1 / mean squared error) in dB, at most {IDENTICAL_DB:g}; mean over cases",
    "ssim": "range 1, Gaussian window of 11 x 11 x 11, sigma 1.5, mean over the windows inside the box",
    "pattern": "given -> painted; a teacher is given what it paints again; cases that lack one of the two are left out",
}


def score_paintings(
    predictor: Predictor, networks: Sequence[str], source: CaseSource, subjects: Sequence[str], rank: int = 0, world: int = 1,
    stopping: Callable[[], bool] | None = None,
    kept: KeptScores[Completion] | None = None,
) -> list[Completion]:  # fmt: skip
    """Scores of every subject x painter that has what it is given and what it paints, the same on every rank and for any number of ranks.

    Collective with several ranks. `stopping` as in `shared_out`, `kept` as in `score_each`.
    """
    with evaluation_mode(predictor.method):
        return score_each(subjects, lambda key: _score_case(predictor, networks, source, key), rank, world, stopping, kept)


def _score_case(predictor: Predictor, networks: Sequence[str], source: CaseSource, key: str) -> list[Completion]:
    sample = source.subject(key)
    volume, found = predictor.volume(sample.image, sample.brain, sample.meta), []
    for network in networks:
        given, painted = predictor.method.painted(network)
        if not {given, painted} <= {*sample.meta.sequences}:
            continue
        made = predictor.scores(network, volume, parse_subset(given, predictor.sequences))[0]
        truth = volume.image[0, predictor.sequences.index(painted)][volume.inner]
        pair = [image.clamp(0, 1).cpu().numpy() for image in (made, truth)]
        found.append(Completion(network, key, given, painted, Likeness(truth.shape[-1], psnr(*pair), ssim(*pair))))
    return found
