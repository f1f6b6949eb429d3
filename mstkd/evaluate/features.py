"""What a method's features of single sequences look like: a figure in two dimensions, and how well a classifier tells the sequences apart.

Shared features should not say which sequence they came from, specific ones should (ShaSpec, arXiv:2307.14126, shows both in a plane).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from monai.data.utils import dense_patch_slices
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.source import CaseSource

FOLDS = 5  # of subjects, at most


@dataclass(frozen=True)
class FeatureSet:
    """N vectors of one kind, e.g. shared."""

    vectors: NDArray[np.float32]  # (N, C)
    sequence: NDArray[np.intp]  # (N,) which one each came from
    subject: NDArray[np.intp]  # (N,)

    def accuracy(self) -> float:
        """Share of vectors whose sequence a logistic regression names that saw other subjects only (cross-validated by subject)."""
        folds = GroupKFold(min(FOLDS, len(np.unique(self.subject))))
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        named = cross_val_predict(classifier, self.vectors, self.sequence, groups=self.subject, cv=folds)
        return float((named == self.sequence).mean())

    def chance(self) -> float:
        """Of always naming the most frequent sequence."""
        return float(np.bincount(self.sequence).max() / len(self.sequence))


def collect(predictor: Predictor, source: CaseSource, subjects: Sequence[str]) -> dict[str, FeatureSet]:
    """The kinds of features that the method offers, one vector per sequence and window of a case (side by side, no overlap).

    Empty where the method offers none, or there are not two subjects to tell apart. All sequences of a case are given.
    """
    if len(subjects) < 2:
        return {}
    parts: dict[str, list[tuple[NDArray, Sequence[int], int]]] = {}
    with evaluation_mode(*predictor.methods):
        for number, subject in enumerate(subjects):
            sample = source.subject(subject)
            volume = predictor.volume(sample.image, sample.brain, sample.meta)
            available = torch.tensor([volume.present], device=predictor.device)
            for place in dense_patch_slices(volume.image.shape[2:], predictor.window, predictor.window):
                for kind, (vectors, sequences) in predictor.method.features(volume.image[..., *place], available).items():
                    parts.setdefault(kind, []).append((vectors.cpu().numpy(), sequences, number))
    return {
        kind: FeatureSet(
            np.concatenate([vectors for vectors, _, _ in found]),
            np.concatenate([sequences for _, sequences, _ in found]),
            np.concatenate([[number] * len(sequences) for _, sequences, number in found]),
        )
        for kind, found in parts.items()
    }


def draw(sets: dict[str, FeatureSet], sequences: Sequence[str], path: Path) -> dict[str, dict[str, float]]:
    """Write the figure: one panel per kind, its two principal components, coloured by sequence. Returns accuracy, chance and n by kind."""
    found = {kind: {"accuracy": one.accuracy(), "chance": one.chance(), "n": len(one.vectors)} for kind, one in sets.items()}
    figure = Figure(figsize=(5 * len(sets), 4.6), layout="constrained", facecolor="white")
    table = matplotlib.colormaps["tab10"]
    for axes, (kind, one) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        pca = PCA(2)
        plane = pca.fit_transform(StandardScaler().fit_transform(one.vectors))
        for m, name in enumerate(sequences):
            mine = one.sequence == m
            axes.scatter(*plane[mine].T, s=22, color=table(m), alpha=0.75, linewidths=0, label=name)
        for axis, share in (("x", pca.explained_variance_ratio_[0]), ("y", pca.explained_variance_ratio_[1])):
            getattr(axes, f"set_{axis}label")(f"principal component, {share:.0%} of the variance")
        score = found[kind]
        axes.set_title(f"{kind} features: sequence named in {score['accuracy']:.0%} (chance {score['chance']:.0%})", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return found
