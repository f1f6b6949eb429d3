"""How a page reads the evaluations of each task: measures, rows, columns, and the figure of a single case.

A row is what was given, e.g. "flair+t1"; a column is a region, a class or the sequence that was made.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mstkd.evaluate.classification import ALL
from mstkd.evaluate.summary import mean_known
from mstkd.measures import ACCURACY, ASSD, AUC, COMPLETION, DICE, HD95, PSNR, SSIM, Measure, Unit

Summary = Mapping[str, Any]
MOST_PANELS = 6  # a page shows no more columns one by one; of more their mean


class Scores(ABC):
    """How those of a task are read."""

    name: ClassVar[str]
    evidence: ClassVar[str]  # the column of per_case.csv that only this task has
    columns_name: ClassVar[str]  # in the plural
    known: ClassVar[tuple[Measure, ...]]
    of_a_case: ClassVar[Measure]  # what the box plots show

    def measures(self, summary: Summary) -> list[Measure]:
        """Those of the known measures that the evaluation holds."""
        return [measure for measure in self.known if measure.key in self._some_cell(summary)]

    @abstractmethod
    def columns(self, summary: Summary) -> list[str]: ...

    @abstractmethod
    def given(self, summary: Summary) -> list[str]:
        """The rows, in the order of the evaluation."""

    @abstractmethod
    def value(self, summary: Summary, given: str, column: str, key: str) -> float | None: ...

    @abstractmethod
    def mean(self, summary: Summary, column: str, key: str) -> float | None:
        """Of a column, over all that was given."""

    @abstractmethod
    def case(self, row: Mapping[str, str]) -> tuple[str, str, float]:
        """(given, column, figure of `of_a_case`) of a line of per_case.csv."""

    @abstractmethod
    def headlines(self, summary: Summary) -> list[tuple[str, Measure, float | None, str]]:
        """What the run's card says: (title, measure, figure, what else)."""

    @abstractmethod
    def _some_cell(self, summary: Summary) -> Mapping[str, Any]: ...

    def curves(self, summary: Summary) -> list[tuple[str, Measure, list[str]]]:
        """Panels of the curves: title, measure, and the columns whose mean is shown."""
        return [(title, self.known[0], columns) for title, columns in panels(self.columns(summary)).items()]

    def row_value(self, summary: Summary, given: str, columns: Sequence[str], key: str) -> float | None:
        """The mean of a row over `columns`."""
        return mean_known([self.value(summary, given, column, key) for column in columns])


class _BySubset(Scores):
    def columns(self, summary):
        return list(summary["mean"])

    def given(self, summary):
        return list(summary["subsets"])

    def value(self, summary, given, column, key):
        return summary["subsets"].get(given, {}).get(column, {}).get(key)

    def mean(self, summary, column, key):
        return summary["mean"][column].get(key)

    def _some_cell(self, summary):
        return next(iter(summary["mean"].values()))


class SegmentationScores(_BySubset):
    name, evidence, columns_name = "segmentation", "dice", "regions"
    known = (
        Measure("dice", "Dice", DICE, ends=(0, 1)), Measure("dice_nonempty", "Dice, truth non-empty", DICE, primary=False, ends=(0, 1)),
        Measure("hd95_mm", "HD95", HD95), Measure("hd95_nonempty_mm", "HD95, both non-empty", HD95, primary=False),
        Measure("assd_mm", "ASSD", ASSD, primary=False),
        Measure("lesion_dice", "Lesion-wise Dice", DICE, primary=False, ends=(0, 1)), Measure("lesion_hd95_mm", "Lesion-wise HD95", HD95, primary=False),
    )  # fmt: skip
    of_a_case = known[0]

    def case(self, row):
        return row["subset"], row["region"], float(row["dice"])

    def headlines(self, summary):
        shown = []
        for title, columns in panels(self.columns(summary)).items():
            dice, hd95 = (mean_known([self.mean(summary, column, key) for column in columns]) for key in ("dice", "hd95_mm"))
            shown.append((f"{title} Dice", self.known[0], dice, f"HD95 {HD95.dashed(hd95)} mm"))
        return shown


class ClassificationScores(_BySubset):
    name, evidence, columns_name = "classification", "predicted", "classes"
    known = (Measure("accuracy", "Accuracy", ACCURACY, ends=(0, 1)), Measure("auc", "AUC", AUC, ends=(0.5, 1)))
    of_a_case = Measure("probability", "Probability of the true class", Unit("probability", digits=2), ends=(0, 1))

    def case(self, row):
        return row["subset"], ALL, float(row[f"p_{row['truth']}"])

    def headlines(self, summary):
        cell = summary["mean"][ALL]
        return [(measure.title, measure, cell[measure.key], "all classes") for measure in self.known]

    def curves(self, summary):
        return [(measure.title, measure, [ALL]) for measure in self.known]


class SynthesisScores(Scores):
    name, evidence, columns_name = "synthesis", "psnr", "targets"
    known = (*COMPLETION, Measure("brain_psnr", "PSNR round the brain", PSNR, primary=False), Measure("brain_ssim", "SSIM round the brain", SSIM, primary=False))
    of_a_case = known[0]

    def measures(self, summary):
        return [measure for measure in super().measures(summary) if summary["mean"][measure.key] is not None]

    def columns(self, summary):
        return list(dict.fromkeys(pattern.partition("->")[2] for pattern in summary["patterns"]))

    def given(self, summary):
        return list(dict.fromkeys(pattern.partition("->")[0] for pattern in summary["patterns"]))

    def value(self, summary, given, column, key):
        return summary["patterns"].get(f"{given}->{column}", {}).get(key)

    def mean(self, summary, column, key):
        return mean_known([self.value(summary, given, column, key) for given in self.given(summary)])

    def case(self, row):
        given, _, target = row["pattern"].partition("->")
        return given, target, float(row["psnr"])

    def headlines(self, summary):
        own, beside = summary["mean"], {"psnr": "local_psnr", "ssim": "local_ssim", "lpips": ""}
        return [
            (measure.title, measure, own[measure.key], f"round WT {measure.unit.dashed(own.get(beside[measure.key]))}" if beside[measure.key] else "")
            for measure in self.measures(summary) if measure.key in beside
        ]  # fmt: skip

    def curves(self, summary):
        return [(measure.title, measure, self.columns(summary)) for measure in self.measures(summary)[:2]]

    def _some_cell(self, summary):
        return summary["mean"]


ALL_SCORES: tuple[Scores, ...] = (SegmentationScores(), SynthesisScores(), ClassificationScores())


def panels(columns: Sequence[str]) -> dict[str, list[str]]:
    """Title -> the columns that a panel stands for: each by itself, or all together where they are many."""
    if len(columns) <= MOST_PANELS:
        return {column: [column] for column in columns}
    return {f"mean of {len(columns)}": list(columns)}


def missing(given: str, sequences: Sequence[str]) -> int | None:
    """How many sequences a row leaves out; None where its name does not say it."""
    names = given.split("+")
    return len(sequences) - len(names) if {*names} <= {*sequences} else None


def by_case(task: Scores, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> dict[str, list[float]]:
    """Given -> a figure per case: its mean over `columns`."""
    found: dict[str, dict[str, list[float]]] = {}
    for given, subject, value in _of(task, rows, columns):
        found.setdefault(given, {}).setdefault(subject, []).append(value)
    return {given: [sum(values) / len(values) for values in subjects.values()] for given, subjects in found.items()}


def _of(task: Scores, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    for row in rows:
        given, column, value = task.case(row)
        if column in columns:
            yield given, row["subject"], value
