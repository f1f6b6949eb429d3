"""What a comparison found. Fractions are 0..1, distances mm, PSNR dB; nothing here names a subject or a patient."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstkd.compare.costs import Costs
from mstkd.compare.published import PublishedTable
from mstkd.compare.tasks import Task
from mstkd.measures import Estimate, Measure

MEAN = "mean"  # over the patterns: in place of a pattern's name


@dataclass(frozen=True)
class Cell:
    """An arm on a pattern (or their mean) by a measure, which is named by its key."""

    arm: str
    pattern: str
    measure: str
    patients: int
    seeds: int  # 0 of what was not trained
    score: Estimate
    difference: Estimate | None  # to the baseline; None for itself, and where one of both has nothing
    p: float | None  # of a pattern: exploratory, unadjusted; of the mean see `PairedTest`
    beside: float  # shown and not compared: HD95 in mm beside Dice; NaN if there is none


@dataclass(frozen=True)
class PairedTest:
    """An arm against the baseline by a measure: mean over the patterns that both have, patient by patient."""

    arm: str
    baseline: str
    measure: str
    primary: bool  # one of the family that was fixed before looking
    patients: int
    patterns: int
    difference: Estimate
    seed_sd: float | None  # of the arm's mean; None with one seed
    baseline_seed_sd: float | None
    p: float | None
    p_holm: float | None  # over the primary measures of this arm; None for the others
    says: str  # how p was found, or why it is not given


@dataclass(frozen=True)
class ArmSummary:
    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    patterns: tuple[str, ...]
    settings: dict[str, Any]  # where the arms differ
    seed_sd: dict[str, float] | None  # per measure, of the mean over its patterns; None with one seed
    costs: Costs
    notes: tuple[str, ...]
    mark: str  # why it is not ranked; empty if it is


@dataclass(frozen=True)
class Comparison:
    """The whole of it; `cells` hold every arm x (pattern or "mean") x measure."""

    out: Path
    task: Task
    baseline: str
    arms: dict[str, ArmSummary]
    patterns: tuple[str, ...]
    measures: tuple[Measure, ...]
    cells: dict[tuple[str, str, str], Cell]  # by (arm, pattern, measure)
    tests: tuple[PairedTest, ...]
    facts: dict[str, str]  # for the head of the report
    conventions: dict[str, str]
    published: tuple[PublishedTable, ...]

    def mean(self, arm: str, measure: str) -> Cell:
        return self.cells[arm, MEAN, measure]
