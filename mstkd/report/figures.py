"""Which charts a page has: scores against the number of missing sequences, scores of single cases, and the course of training."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mstkd import attempts
from mstkd.measures import Measure
from mstkd.report.charts import Boxes, Chart, Series, box_chart, line_chart
from mstkd.report.entries import Entry, ReportedRun
from mstkd.report.scores import Scores, by_case, missing, panels
from mstkd.track.jsonl import read_records

MOST_POINTS = 200  # of a line: of longer records each point is the mean of its neighbours
GROUPS = {  # heading -> how the names of its figures begin
    "Validation": ("val/",),
    "Losses": ("train/",),
    "Optimiser": ("lr/", "gradient_norm/", "train/skipped_steps", "train/loss_scale"),
    "Speed and memory": ("time/", "compute/", "memory/"),
}


@dataclass(frozen=True)
class Group:
    title: str
    charts: list[Chart]


def curves(task: Scores, runs: Sequence[ReportedRun]) -> list[Chart]:
    """Scores against the number of missing sequences: lines through the means over subsets, a dot for each. None where all lack as many."""
    sequences, entries = runs[0].sequences, [entry for run in runs for entry in run.entries]
    charts = []
    for title, measure, columns in task.curves(entries[0].summary):
        series = [found for entry in entries if (found := _by_missing(task, entry, measure, columns, sequences)).points]
        counts = sorted({int(x) for one in series for x, _ in one.points})
        if len(counts) > 1:
            ends = _shown(measure, measure.ends)
            charts.append(line_chart(title, "", measure.unit.heading, "missing sequences", series, ends, counts))
    return charts


def _by_missing(task: Scores, entry: Entry, measure: Measure, columns: Sequence[str], sequences: Sequence[str]) -> Series:
    dots, found = [], {}
    for given in task.given(entry.summary):
        count, value = missing(given, sequences), task.row_value(entry.summary, given, columns, measure.key)
        if count is not None and value is not None:
            shown = measure.unit.shown(value)
            dots.append((count, shown, f"{entry.label}, {given}: {measure.unit.text(value)}"))
            found.setdefault(count, []).append(shown)
    return Series(entry.number, entry.label, [(count, statistics.fmean(found[count])) for count in sorted(found)], dots)


def boxes(task: Scores, runs: Sequence[ReportedRun]) -> dict[str, list[Boxes]]:
    """By label of the entry: the scores of single cases for all that was given."""
    found = {}
    for entry in (entry for run in runs for entry in run.entries):
        columns = dict.fromkeys(task.case(row)[1] for row in entry.rows)
        found[entry.label] = [_boxes(task, entry, title, group) for title, group in panels(list(columns)).items()]
    return found


def _boxes(task: Scores, entry: Entry, title: str, columns: Sequence[str]) -> Boxes:
    measure, scores = task.of_a_case, by_case(task, entry.rows, columns)
    given = [name for name in task.given(entry.summary) if name in scores]
    groups = {name: [measure.unit.shown(value) for value in scores[name]] for name in given}
    return box_chart(title, measure.unit.heading, groups, _shown(measure, measure.ends), entry.number)


def _shown(measure: Measure, ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return ends and (measure.unit.shown(ends[0]), measure.unit.shown(ends[1]))


def training(runs: Sequence[ReportedRun]) -> dict[str, list[Group]]:
    """By stage: charts of what metrics.jsonl holds, a line per run. With one run its restarts are marked."""
    lines: dict[tuple[str, str], list[Series]] = {}
    restarts: dict[str, list[float]] = {}
    for run in runs:
        records = read_records(run.folder / "metrics.jsonl")
        for stage, name in dict.fromkeys((r["stage"], name) for r in records for name in r if "/" in name):
            points = [(r["step"], r[name]) for r in records if r["stage"] == stage and r.get(name) is not None]
            if len(points) > 1 and _group(name):
                lines.setdefault((stage, name), []).append(Series(run.entries[0].number, run.label, thinned(points)))
        if len(runs) == 1:
            restarts = {stage: _restarts(run, stage) for stage in dict.fromkeys(record["stage"] for record in records)}
    found: dict[str, dict[str, list[Chart]]] = {}
    for (stage, name), series in lines.items():
        last = f"last {series[0].points[-1][1]:.4g}" if len(runs) == 1 else ""
        inside = [step for step in restarts.get(stage, ()) if series[0].points[0][0] <= step <= series[0].points[-1][0]]
        chart = line_chart(_title(name), last, "", "step", series, marks=inside)
        found.setdefault(stage, {}).setdefault(_group(name), []).append(chart)
    return {stage: [Group(title, groups[title]) for title in GROUPS if title in groups] for stage, groups in found.items()}


def _restarts(run: ReportedRun, stage: str) -> list[float]:
    """The steps at which attempts but the last ended in a stage."""
    endings = [attempt.ending for attempt in attempts.read(run.folder)[:-1]]
    return [ending.step for ending in endings if ending and ending.stage == stage and ending.step]


def _group(name: str) -> str | None:
    """The most fitting heading, None for what belongs to none."""
    fitting = [(len(start), title) for title, starts in GROUPS.items() for start in starts if name.startswith(start)]
    return max(fitting)[1] if fitting else None


def _title(name: str) -> str:
    kind, _, rest = name.partition("/")
    return rest.replace("_", " ") if kind in ("val", "train", "time", "compute") else f"{kind} {rest}".replace("_", " ")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: of longer ones the means of neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [(float(x), float(y)) for part in np.array_split(np.array(points, float), MOST_POINTS) for x, y in [part.mean(axis=0)]]
