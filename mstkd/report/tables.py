"""Heat maps as tables with figures, and the cards above them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mstkd.measures import Measure
from mstkd.report.entries import Entry, ReportedRun
from mstkd.report.scores import Scores, missing

FAR = 3  # times the median: where less is better, all beyond has the last colour, so that one bad figure does not hide the others


@dataclass(frozen=True)
class Cell:
    text: str  # empty: there is no figure
    share: float | None  # of the colour, 0 worst to 1 best
    first: bool  # of a further column's entries


@dataclass(frozen=True)
class HeatRow:
    name: str
    given: tuple[bool, ...] | None  # by sequence; None: the name says it
    cells: list[Cell]
    kind: str  # "", "larger": one more sequence than above, "mean"


@dataclass(frozen=True)
class HeatMap:
    measure: Measure
    columns: list[str]
    entries: list[str]  # labels; each column has one cell for each of them
    rows: list[HeatRow]


@dataclass(frozen=True)
class Headline:
    title: str
    text: str
    unit: str
    share: float | None  # of a bar; None: no bar
    note: str


@dataclass(frozen=True)
class Card:
    """What one scored network reached."""

    entry: Entry
    title: str
    facts: str
    headlines: list[Headline]
    ends: str  # from what it did best and worst


def heat_maps(task: Scores, runs: Sequence[ReportedRun]) -> list[HeatMap]:
    """One per measure that every run's first network has."""
    entries = [entry for run in runs for entry in run.entries]
    shared = [measure for measure in task.measures(entries[0].summary) if all(measure in task.measures(entry.summary) for entry in entries)]
    return [_heat_map(task, measure, entries, runs[0].sequences) for measure in shared]


def _heat_map(task: Scores, measure: Measure, entries: Sequence[Entry], sequences: Sequence[str]) -> HeatMap:
    columns = task.columns(entries[0].summary)
    given = _in_order([name for entry in entries for name in task.given(entry.summary)], sequences)
    values = [[task.value(e.summary, name, column, measure.key) for column in columns for e in entries] for name in given]
    means = [task.mean(entry.summary, column, measure.key) for column in columns for entry in entries]
    low, high = ends(measure, [value for row in [*values, means] for value in row if value is not None])

    def cells(row: Sequence[float | None]) -> list[Cell]:
        return [Cell(measure.unit.text(v), _share(measure, v, low, high), 1 < len(entries) <= n and n % len(entries) == 0) for n, v in enumerate(row)]

    counts = [missing(name, sequences) for name in given]
    rows = []
    for number, (name, row) in enumerate(zip(given, values, strict=True)):
        seen = None if None in counts else tuple(sequence in name.split("+") for sequence in sequences)
        larger = number > 0 and counts[number] != counts[number - 1]
        rows.append(HeatRow(name, seen, cells(row), "larger" if larger else ""))
    rows.append(HeatRow("mean", None, cells(means), "mean"))
    return HeatMap(measure, columns, [entry.label for entry in entries], rows)


def _in_order(names: Sequence[str], sequences: Sequence[str]) -> list[str]:
    """Each once: by the number of sequences, then as they were met."""
    once = list(dict.fromkeys(names))
    return sorted(once, key=lambda name: -(missing(name, sequences) or 0))


def ends(measure: Measure, values: Sequence[float]) -> tuple[float, float]:
    """The figures that have a measure's first and last colour."""
    if measure.ends is not None or not values:
        return measure.ends or (0.0, 1.0)
    low = min(values) if measure.unit.larger_is_better else 0.0
    high = max(values) if measure.unit.larger_is_better else min(max(values), FAR * median(values))
    return low, max(high, low + 1e-9)


def _share(measure: Measure, value: float | None, low: float, high: float) -> float | None:
    if value is None:
        return None
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return share if measure.unit.larger_is_better else 1 - share


def cards(task: Scores, runs: Sequence[ReportedRun]) -> list[Card]:
    found = []
    for run in runs:
        for entry in run.entries:
            title = entry.label if len(runs) > 1 else f"{run.label}: {entry.label}"
            mark = "an oracle: it was given the labels of these cases" if entry.oracle else f"seed {run.config.seed}, {len(run.subjects)} cases"
            headlines = [_headline(*parts) for parts in task.headlines(entry.summary)]
            found.append(Card(entry, title, f"{run.method}, {mark}", headlines, _ends(task, entry)))
    return found


def _ends(task: Scores, entry: Entry) -> str:
    """What was given when the network did best and worst, by the first of its curves' measures."""
    _, measure, _ = task.curves(entry.summary)[0]
    columns = [column for _, one, columns in task.curves(entry.summary) if one is measure for column in columns]
    values = {name: task.row_value(entry.summary, name, columns, measure.key) for name in task.given(entry.summary)}
    ranked = sorted((value, name) for name, value in values.items() if value is not None)
    if len(ranked) < 2:
        return ""
    (low, hardest), (high, easiest) = ranked[0], ranked[-1]
    return f"Mean {measure.unit.heading}: best from {easiest}, {measure.unit.text(high)}; hardest {hardest}, {measure.unit.text(low)}"


def _headline(title: str, measure: Measure, value: float | None, note: str) -> Headline:
    text, unit = measure.unit.dashed(value), measure.unit.heading.partition(" ")[2]
    share = value if value is not None and measure.ends == (0, 1) else None
    return Headline(title, text, unit, share, note)
