"""What a page is about: evaluated runs, and in each of them the networks that were scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstkd.compare.runs import read_evaluation
from mstkd.config import RunConfig
from mstkd.errors import UserError
from mstkd.report.scores import ALL_SCORES, Scores
from mstkd.run_folder import read_record, read_run_config


@dataclass(frozen=True)
class Entry:
    """A scored network of a run: one colour of the page."""

    label: str
    number: int  # from 0
    network: str
    summary: dict[str, Any]
    rows: list[dict[str, str]]  # of per_case.csv

    @property
    def oracle(self) -> bool:
        return bool(self.summary.get("oracle"))


@dataclass(frozen=True)
class ReportedRun:
    folder: Path
    label: str
    config: RunConfig
    record: dict[str, Any]
    task: Scores
    entries: tuple[Entry, ...]  # the first is the network that the run is for

    @property
    def method(self) -> str:
        return self.config.method["name"]

    @property
    def data(self) -> dict[str, Any]:
        return self.record["data"]

    @property
    def sequences(self) -> list[str]:
        return self.data["sequences"]

    @property
    def subjects(self) -> list[str]:
        return sorted({row["subject"] for row in self.entries[0].rows})


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """The evaluated runs in `folders`. Raises UserError: no run, not evaluated, twice the same, or runs that no table can hold together."""
    runs: list[ReportedRun] = []
    for folder in map(Path, folders):
        if any(folder.resolve() == run.folder.resolve() for run in runs):
            raise UserError(f"{folder}: given twice; name each run once")
        runs.append(_read(folder, {run.label for run in runs}, sum(len(run.entries) for run in runs), alone=len(folders) == 1))
        _check_together(runs[0], runs[-1])
    return runs


def _read(folder: Path, taken: set[str], number: int, alone: bool) -> ReportedRun:
    config, record = read_run_config(folder), read_record(folder)
    rows, summaries = read_evaluation(folder)
    task = next((task for task in ALL_SCORES if task.evidence in rows[0]), None)
    if task is None:
        raise UserError(f"{folder}/evaluation/per_case.csv: holds no scores that this version knows; run `mstkd evaluate {folder}` again")
    name = config.name if config.name not in taken else f"{config.name} ({len(taken) + 1})"
    entries = []
    for place, (network, summary) in enumerate(summaries.items()):
        label = network if alone else name if not place else f"{name}, {network}"
        own = [row for row in rows if row["network"] == network]
        entries.append(Entry(label, number + place, network, summary, own))
    return ReportedRun(folder, name, config, record, task, tuple(entries))


def _check_together(first: ReportedRun, run: ReportedRun) -> None:
    advice = "report them one by one"
    if run.task is not first.task:
        raise UserError(f"{run.folder} is a run of {run.task.name} and {first.folder} of {first.task.name}; {advice}")
    for what, ours, theirs in (
        ("sequences", run.sequences, first.sequences),
        (first.task.columns_name, run.task.columns(run.entries[0].summary), first.task.columns(first.entries[0].summary)),
    ):
        if ours != theirs:
            raise UserError(f"{run.folder} has {what} {', '.join(ours)} and {first.folder} {', '.join(theirs)}; {advice}")
