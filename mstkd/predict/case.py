"""One case from its files to a label map on its own grid."""

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mstkd.data.sample import Sample
from mstkd.evaluate.inference import Predictor
from mstkd.shards.dataset import Case, DatasetSpec
from mstkd.shards.preprocess import Preprocessed, preprocess
from mstkd.shards.raw_case import check_headers
from mstkd.subsets import Subset, largest_given, subset_name


@dataclass(frozen=True)
class Prediction:
    """What was found in a case; maps have the grid and the axes of its file."""

    labels: NDArray[np.uint8]
    probabilities: dict[str, NDArray[np.float32]]  # by region, 0 outside the brain's box; only where asked for
    subset: Subset  # that was used
    subset_name: str
    stored: Preprocessed
    inference_s: float  # the networks' share


def predict_case(predictor: Predictor, network: str, case: Case, dataset: DatasetSpec, probabilities: bool = False) -> Prediction:
    """Read and predict a case; call it in `evaluation_mode`. Raises UserError: files that cannot be read, do not fit or lack what the network needs."""
    check_headers(case, dataset)
    stored = preprocess(replace(case, label=None), dataset, predictor.sequences)
    shown = predictor.case(Sample(stored.image, stored.brain, None, stored.meta))
    subset = largest_given(case.subject, predictor.sequences, predictor.takes, shown.present)
    began = time.perf_counter()
    volume, visible = shown.given(subset)
    scores = predictor.scores(network, volume, visible)
    inference_s = time.perf_counter() - began
    labels = predictor.file_labels(scores, volume, visible)
    told = predictor.file_probabilities(scores, volume, visible) if probabilities else {}
    return Prediction(labels, told, subset, subset_name(predictor.sequences, subset), stored, inference_s)


def entropy_bits(probabilities: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """0 to 1: of every voxel the predictive entropy of "in the region or not", the largest over the regions.

    -p log2 p - (1 - p) log2 (1 - p), p being the probability averaged over ensemble and mirrored views (Lakshminarayanan et al.,
    NeurIPS 2017; region by region as in QU-BraTS, Mehta et al., MELBA 2022).
    """
    largest: NDArray[np.float32] | None = None
    for p in probabilities.values():
        p = p.clip(1e-7, 1 - 1e-7)
        bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        largest = bits if largest is None else np.maximum(largest, bits)
    return np.where(largest < 1e-5, 0, largest).astype(np.float32)
