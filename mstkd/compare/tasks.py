"""The tasks whose evaluations can be compared: how their files are read, and what rows and columns are called."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

from mstkd.measures import COMPLETION, Measure, overlap_in
from mstkd.subsets import all_subsets, subset_name


@dataclass(frozen=True)
class CaseScore:
    """What per_case.csv says of one case, pattern and measure; NaN where it was not measured."""

    value: float
    truth: int  # voxels or slices of the truth that it was measured on
    beside: float = nan  # shown beside it and not compared: HD95 in mm


class Task(ABC):
    """A pattern is what a row of a comparison stands for: the sequences that were given, or also the one that was made of them."""

    name: ClassVar[str]  # as methods say it
    evidence: ClassVar[str]  # the column of per_case.csv that only this task has
    pattern: ClassVar[str]  # the noun of a row
    measure: ClassVar[str]  # that of a column
    score: ClassVar[str]  # that of a figure
    title: ClassVar[str]  # of a table of means
    truth: ClassVar[str]  # what CaseScore.truth counts
    legend: ClassVar[str]  # what figures are
    change: ClassVar[str]  # and what their differences are
    printed: ClassVar[tuple[str, ...]]  # parts of a published figure
    ours: ClassVar[str]  # what stands beside it
    columns: ClassVar[tuple[str, ...]]  # of compare.csv: the score, and what is beside it

    @abstractmethod
    def patterns(self, sequences: Sequence[str]) -> list[str]:
        """All there can be, in their usual order."""

    @abstractmethod
    def measures(self, keys: Sequence[str]) -> tuple[Measure, ...]:
        """Of evaluations that measured `keys`."""

    @abstractmethod
    def scores(self, row: Mapping[str, str]) -> Iterator[tuple[str, str, CaseScore]]:
        """(pattern, measure's key, score) of a line of per_case.csv."""

    @abstractmethod
    def means(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None, int]]:
        """(pattern, measure's key, mean over cases, their number) of a summary.json."""

    def metric(self, key: str) -> str:
        """The measure's name in MLflow."""
        return key


class Segmentation(Task):
    """Dice by region for each subset of sequences."""

    name, evidence = "segmentation", "dice"
    pattern, measure, score, title, truth = "subset", "region", "Dice", "Dice %", "voxels"
    legend, change = "Dice in per cent", "in percentage points"
    printed, ours, columns = ("Dice %", "HD95"), "Dice % / HD95 mm", ("dice", "hd95_mm")

    def patterns(self, sequences):
        return [subset_name(sequences, subset) for subset in all_subsets(sequences)]

    def measures(self, keys):
        return overlap_in(keys)

    def scores(self, row):
        yield row["subset"], row["region"], CaseScore(float(row["dice"]), int(row["truth_voxels"]), float(row["hd95_mm"] or nan))

    def means(self, summary):
        for subset, regions in summary["subsets"].items():
            for region, cell in regions.items():
                yield subset, region, cell["dice"], cell["n"]

    def metric(self, key):
        return f"dice/{key}"


class Synthesis(Task):
    """How like the true sequence a completed one is, for each given -> target; the local figures are those round the tumour."""

    name, evidence = "synthesis", "psnr"
    pattern, measure, score, title, truth = "pattern", "measure", "score", "PSNR and SSIM", "slices"
    legend, change = "PSNR in dB, SSIM from 0 to 1; of z gradient, spectrum and LPIPS lower is better", "in the same units"
    printed, ours, columns = ("Score",), "means over patterns", ("score",)

    def patterns(self, sequences):
        return [f"{subset_name(sequences, subset)}->{target}" for subset in all_subsets(sequences) for target in sequences]

    def measures(self, keys):
        return tuple(measure for measure in COMPLETION if measure.key in keys)

    def scores(self, row):
        for measure in COMPLETION:
            slices = int(row["local_slices" if measure.local else "slices"])
            yield row["pattern"], measure.key, CaseScore(float(row.get(measure.key) or nan), slices)

    def means(self, summary):
        for pattern, cell in summary["patterns"].items():
            for measure in COMPLETION:
                if measure.key in cell:
                    yield pattern, measure.key, cell[measure.key], cell["local_n" if measure.local else "n"]


TASKS: tuple[Task, ...] = (Segmentation(), Synthesis())
