"""How near a student's features are to its teacher's, where a method offers both (UTAD-Net, arXiv:2403.20168, Table III).

Letters: K slices, C channels, s positions per axis of a feature map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from mstkd.evaluate.completion import Completer, Slices
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.sharing import shared_out
from mstkd.evaluate.source import CaseSource
from mstkd.files import write_json
from mstkd.subsets import Subset, part_of, possible_subsets

PICTURE = "fused_features.png"
CAPTION = "Mean absolute difference of the student's features from the teacher's: a tile per channel, its positions in place"
GAP = 1  # positions between two tiles


@dataclass(frozen=True)
class FeatureErrors:
    """Means over the slices and directions of a case, then over cases."""

    absolute: NDArray[np.float32]  # (C, s, s) mean absolute error
    mse: float
    cases: int

    def write(self, folder: Path) -> dict[str, str]:
        """fused_features.json and the picture; what a report says of them."""
        figures = {"mae": float(self.absolute.mean()), "mse": self.mse, "n": self.cases, "channels": len(self.absolute)}
        write_json(folder / "fused_features.json", figures)
        self._draw(folder / PICTURE)
        text = f"MAE {figures['mae']:.4f}, MSE {figures['mse']:.4f} against the teacher's, over {self.cases} cases"
        Console().print(f"features of the student: {text}", highlight=False)
        return {"features of the student": text}

    def _draw(self, path: Path) -> None:
        channels, size, _ = self.absolute.shape
        columns = int(np.ceil(np.sqrt(channels)))
        step = size + GAP
        wall = np.full((-(-channels // columns) * step - GAP, columns * step - GAP), np.nan, np.float32)
        for number, tile in enumerate(self.absolute):
            row, column = (part * step for part in divmod(number, columns))
            wall[row : row + size, column : column + size] = tile.T[::-1]  # anterior up
        figure = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        image = axes.imshow(wall, cmap="inferno", vmin=0, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(image, ax=axes, label="mean absolute difference")
        figure.savefig(path, dpi=130)


def measure(
    completer: Completer, networks: Sequence[str], source: CaseSource, subjects: Sequence[str], rank: int = 0, world: int = 1
) -> FeatureErrors | None:
    """Of the first of `networks` against the oracle among them, over every direction that a case has; None where the method has no such features.

    The same on every rank and for any number of ranks. Collective with several.
    """
    method, student = completer.method, networks[0]
    oracle = next((network for network in networks if network in method.oracles), None)
    if oracle in (None, student) or not method.offers_fused:
        return None
    subsets = possible_subsets(completer.sequences, method.subsets)

    def errors(number: int) -> list[tuple[NDArray[np.float32], float]]:
        case = completer.slices(source.subject(subjects[number]))
        found = [_errors(completer, case, subset, student, oracle) for subset in subsets if part_of(subset, case.present)]
        return [(np.mean([absolute for absolute, _ in found], 0), float(np.mean([square for _, square in found])))]

    with evaluation_mode(method):
        cases = shared_out(len(subjects), errors, rank, world)
    return FeatureErrors(np.mean([absolute for absolute, _ in cases], 0), float(np.mean([square for _, square in cases])), len(cases))


def _errors(completer: Completer, case: Slices, subset: Subset, student: str, teacher: str) -> tuple[NDArray[np.float32], float]:
    """Mean absolute error (C, s, s) and mean squared error over the slices of a case and the sequences that `subset` leaves out."""
    absolute, square, batch, count = 0.0, 0.0, completer.inference.batch, len(case.position)
    for first in range(0, count, batch):
        part = case.part(first, first + batch)
        ours, theirs = (completer.fused(network, part, subset) for network in (student, teacher))
        difference = (ours - theirs).double()  # (K, N, C, s, s)
        absolute = absolute + difference.abs().mean(1).sum(0)
        square += float(difference.square().mean((1, 2, 3, 4)).sum())
    return torch.as_tensor(absolute / count, dtype=torch.float32).cpu().numpy(), square / count
