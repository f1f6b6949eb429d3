"""How hard the phantom is: Dice of the voxel-wise Bayes classifier for each subset of sequences.

    python -m mstkd.shards.calibration [--subjects N --size 64 --seed 0]

What is estimated: p(label | z-scored intensities of one voxel in the available sequences), by smoothed joint
histograms of the first two thirds of the subjects; those of a subset are marginal sums of the full one. A voxel
is given to a region when the region's posterior exceeds the threshold with the best Dice pooled over those
subjects (the Bayes decision for Dice is such a threshold). Reported: Dice on the remaining third, mean over the
subjects whose truth holds the region. It is what intensities alone tell; neighbourhood and position, which a
network also uses, are left out.
"""

import argparse
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from mstkd.shards.phantom import SEQUENCES, Subject, make_subject
from mstkd.shards.spec import LABEL_SCHEMES

BINS = 24  # per sequence
RANGE = -3.5, 4.5  # z-scores; what lies outside counts in the outermost bin
SMOOTHING_BINS = 0.7  # Gaussian sd: histogram cells would otherwise be too sparse
REGIONS = LABEL_SCHEMES["brats2018"].regions


def calibrate(subjects: int, size: int = 64, seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean held-out Dice by subset ("flair+t1", ...) and region ("WT", "TC", "ET"), all 15 subsets."""
    cases = [_binned(make_subject(seed, index, size)) for index in range(subjects)]
    fitted = max(1, 2 * subjects // 3)
    counts = _region_counts(cases[:fitted])
    result = {}
    for count in range(len(SEQUENCES), 0, -1):
        for subset in combinations(range(len(SEQUENCES)), count):
            name = "+".join(SEQUENCES[i] for i in subset)
            result[name] = _held_out_dice(counts, cases[fitted:], subset)
    return result


def _binned(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Bin numbers (4, V) of the z-scored brain voxels and their labels (V,)."""
    brain = subject.tissue > 0
    bins = []
    for sequence in SEQUENCES:
        values = subject.volumes[sequence][brain].astype(np.float32)
        position = ((values - values.mean()) / values.std() - RANGE[0]) / (RANGE[1] - RANGE[0])
        bins.append(np.clip(position * BINS, 0, BINS - 1).astype(np.intp))
    return np.stack(bins), subject.label[brain]


def _region_counts(cases: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joint histogram (BINS,) * 4 of all brain voxels ("all") and of each region's, smoothed."""
    bins, labels = np.concatenate([b for b, _ in cases], axis=1), np.concatenate([label for _, label in cases])
    cells = np.ravel_multi_index(tuple(bins), (BINS,) * len(SEQUENCES))
    chosen = {"all": np.ones(len(labels), bool)} | {region: np.isin(labels, values) for region, values in REGIONS.items()}
    counts = {}
    for name, members in chosen.items():
        histogram = np.bincount(cells[members], minlength=BINS ** len(SEQUENCES)).reshape((BINS,) * len(SEQUENCES))
        counts[name] = ndimage.gaussian_filter(histogram.astype(np.float32), SMOOTHING_BINS, mode="constant", truncate=3)
    return counts


def _held_out_dice(
    counts: dict[str, np.ndarray], cases: list[tuple[np.ndarray, np.ndarray]], subset: tuple[int, ...]
) -> dict[str, float]:
    hidden = tuple(i for i in range(len(SEQUENCES)) if i not in subset)
    total = counts["all"].sum(axis=hidden)
    dice = {}
    for region, values in REGIONS.items():
        decision = _best_decision(counts[region].sum(axis=hidden), total)
        scores = []
        for bins, labels in cases:
            truth, predicted = np.isin(labels, values), decision[tuple(bins[i] for i in subset)]
            if truth.any():
                scores.append(2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()))
        dice[region] = float(np.mean(scores)) if scores else float("nan")
    return dice


def _best_decision(region: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Bool per cell: the cells of highest posterior, as many as give the best pooled Dice."""
    posterior = region / np.maximum(total, 1e-9)
    order = np.argsort(-posterior, axis=None, kind="stable")
    hits, size = np.cumsum(region.ravel()[order], dtype=float), np.cumsum(total.ravel()[order], dtype=float)
    best = int(np.argmax(2 * hits / (size + region.sum())))
    decision = np.zeros(region.size, bool)
    decision[order[: best + 1]] = True
    return decision.reshape(region.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dice of the voxel-wise Bayes classifier on the phantom, per subset of sequences.")
    parser.add_argument("--subjects", type=int, default=60, help="two thirds to fit, one third to score")
    parser.add_argument("--size", type=int, default=64, help="voxels per axis")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table("sequences", *REGIONS, title=f"Voxel-wise Bayes classifier: Dice, {arguments.subjects} subjects, size {arguments.size}")
    for subset, dice in calibrate(arguments.subjects, arguments.size, arguments.seed).items():
        table.add_row(subset, *(f"{dice[region]:.3f}" for region in REGIONS))
    Console().print(table)


if __name__ == "__main__":
    main()
