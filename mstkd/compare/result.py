"""What a comparison found. Fractions are 0..1, distances mm; nothing here names a subject or a patient."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstkd.compare.costs import Costs
from mstkd.compare.published import PublishedTable

MEAN = "mean"  # over the subsets: in place of a subset's name


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """An arm on a subset (or their mean) in a region."""

    arm: str
    subset: str
    region: str
    patients: int
    seeds: int
    dice: Estimate
    difference: Estimate | None  # to the baseline; None for itself, and where one of both has nothing
    p: float | None  # of a subset: exploratory, unadjusted; of the mean see `PairedTest`
    hd95_mm: float


@dataclass(frozen=True)
class PairedTest:
    """An arm against the baseline in a region: mean over the subsets that both have, patient by patient."""

    arm: str
    baseline: str
    region: str
    primary: bool  # one of the family that was fixed before looking
    patients: int
    subsets: int
    difference: Estimate
    seed_sd: float | None  # of the arm's mean; None with one seed
    baseline_seed_sd: float | None
    p: float | None
    p_holm: float | None  # over the regions of this arm
    says: str  # how p was found, or why it is not given


@dataclass(frozen=True)
class ArmSummary:
    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    subsets: tuple[str, ...]
    settings: dict[str, Any]  # where the arms differ
    seed_sd: dict[str, float] | None  # per region, of the mean over its subsets; None with one seed
    costs: Costs
    notes: tuple[str, ...]
    oracle: bool


@dataclass(frozen=True)
class Comparison:
    """The whole of it; `cells` hold every arm x (subset or "mean") x region."""

    out: Path
    baseline: str
    arms: dict[str, ArmSummary]
    subsets: tuple[str, ...]
    regions: tuple[str, ...]
    cells: dict[tuple[str, str, str], Cell]  # by (arm, subset, region)
    tests: tuple[PairedTest, ...]
    facts: dict[str, str]  # for the head of the report
    conventions: dict[str, str]
    published: tuple[PublishedTable, ...]

    def mean(self, arm: str, region: str) -> Cell:
        return self.cells[arm, MEAN, region]
