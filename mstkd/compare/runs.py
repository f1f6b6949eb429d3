"""Evaluated runs as they lie on disk, and whether they may be compared: same task, same cases, same conventions."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mstkd.compare.tasks import TASKS, CaseScore, Task
from mstkd.config import RunConfig, read_recipe
from mstkd.errors import UserError
from mstkd.evaluate.scoring import ADDED
from mstkd.run_folder import best_steps, read_record, read_run_config

NOTES = ("overlap", "never trained", "postprocess", "oracle", "completed")  # entries of summary["conventions"] that speak of the run, not of how figures are made
ORACLE, FLOOR = "oracle", "floor"  # used the test cases' labels; learned nothing
COPY = "copy_per_case.csv"  # scores of the first given sequence, taken for the wanted one
COPIES_AGREE = 1e-3  # in dB and in SSIM; on another device an image is resampled a little differently

Scores = dict[str, dict[str, dict[str, CaseScore]]]  # pattern -> subject -> measure's key


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with one of its evaluations on a test split, by one network."""

    folder: Path  # as it was given: the run's, or that of another evaluation inside it
    trained: Path  # the run's folder
    evaluation: Path  # the folder of the evaluation's files
    config: RunConfig
    data: dict[str, Any]  # the record's data facts: names, sequences, digest
    task: Task
    network: str
    scores: Scores
    conventions: dict[str, str]
    notes: dict[str, str]
    mark: str = ""  # why it is not ranked: ORACLE or FLOOR
    references: tuple["EvaluatedRun", ...] = ()  # what the evaluation scored beside the network that the run is for

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def subjects(self) -> list[str]:
        return sorted({subject for cases in self.scores.values() for subject in cases})

    @property
    def keys(self) -> list[str]:
        return list(next(iter(next(iter(self.scores.values())).values())))

    @property
    def measured(self) -> list[str]:
        """Those of its keys that some case has a figure of."""
        cases = [case for cases in self.scores.values() for case in cases.values()]
        return [key for key in self.keys if any(np.isfinite(case[key].value) for case in cases)]


def read_evaluated_run(folder: Path) -> EvaluatedRun:
    """The evaluation of the run in `folder`, or the one in `folder` itself, which `mstkd evaluate` put inside a run.

    Raises UserError: no run, not evaluated, not on a test split, another task, files that disagree.
    """
    folder = Path(folder)
    trained, evaluation = _places(folder)
    own = evaluation / "config.yaml"
    config, data = read_recipe(own) if own.is_file() else read_run_config(trained), read_record(trained)["data"]
    rows_path = evaluation / "per_case.csv"
    rows, summaries = read_evaluation(folder)
    task = _task(rows_path, rows)

    def scored(network: str, summary: dict[str, Any]) -> EvaluatedRun:
        scores = _scores(task, [row for row in rows if row["network"] == network], rows_path, trained)
        _check_agreement(evaluation, task, scores, summary)
        texts, mark = summary["conventions"], ORACLE if summary.get("oracle") else ""
        ours, notes = ({key: text for key, text in texts.items() if (key in NOTES) == noted} for noted in (False, True))
        return EvaluatedRun(folder, trained, evaluation, config, data, task, network, scores, ours, notes, mark)

    (first, summary), *others = summaries.items()
    if summary["split"] != "test":
        raise UserError(f"{folder}: is of the split {summary['split']}; compare evaluations of test splits")
    run = scored(first, summary)
    oracles = [scored(network, summary) for network, summary in others if summary.get("oracle")]
    return replace(run, references=(*oracles, *_copies(run)))


def read_evaluation(folder: Path) -> tuple[list[dict[str, str]], dict[str, dict[str, Any]]]:
    """The lines of per_case.csv and the summaries by network, the one that the run is for first; `folder` as for `read_evaluated_run`.

    Raises UserError: not evaluated, or trained on since.
    """
    trained, evaluation = _places(folder)
    rows_path, summary_path = (evaluation / name for name in ("per_case.csv", "summary.json"))
    if not (rows_path.is_file() and summary_path.is_file()):
        raise UserError(f"{folder}: not evaluated on its test split yet; run `mstkd evaluate {folder}` first")
    if not evaluated_since(folder):
        raise UserError(f"{folder}: was trained on after its evaluation; run `mstkd evaluate {trained}` again")
    rows = _read_rows(rows_path, trained)
    first, *others = dict.fromkeys(row["network"] for row in rows)
    paths = {first: summary_path} | {network: evaluation / f"summary_{network}.json" for network in others}
    return rows, {network: json.loads(path.read_text()) for network, path in paths.items() if path.is_file()}


def evaluated_since(folder: Path) -> bool:
    """Whether the evaluation of a run in `folder`, or in `folder` itself, is one of its present best weights.

    Without a note of whose it is, it is taken as such.
    """
    trained, evaluation = _places(Path(folder))
    noted = evaluation / "weights.json"
    return not noted.is_file() or json.loads(noted.read_text()) == best_steps(trained)


def _places(folder: Path) -> tuple[Path, Path]:
    """The run's folder and its evaluation's; `folder` is one of the two."""
    if (folder / "summary.json").is_file():
        return next((parent for parent in folder.absolute().parents if (parent / "record.json").is_file()), folder), folder
    return folder, folder / "evaluation"


def check_comparable(runs: Sequence[EvaluatedRun]) -> None:
    """Raise UserError naming the first case, label or convention in which two runs' evaluations differ."""
    first = runs[0]
    for run in runs:
        if run.task is not first.task:
            raise UserError(f"{run.folder} is a run of {run.task.name} and {first.folder} of {first.task.name}; compare runs of one task")
        _check_conventions(first, run)
    scored: dict[str, EvaluatedRun] = {}  # pattern -> the first run that has it
    truth: dict[tuple[str, str], tuple[int, EvaluatedRun]] = {}
    for run in (one for run in runs for one in (run, *run.references)):
        for pattern, cases in run.scores.items():
            _check_cases(scored.setdefault(pattern, run), run, pattern)
            for subject, measures in cases.items():
                for key, score in measures.items():
                    size, other = truth.setdefault((subject, key), (score.truth, run))
                    if size != score.truth:
                        raise UserError(
                            f"{run.folder} and {other.folder} have other test sets: the truth of case {subject}, {key}, has "
                            f"{score.truth} and {size} {run.task.truth}; compare runs that were evaluated on the same data"
                        )
    _check_copies(runs)


def _check_conventions(first: EvaluatedRun, run: EvaluatedRun) -> None:
    ours, theirs = {*first.conventions}, {*run.conventions}
    beside = (ours ^ theirs) & {*ADDED}  # speak of figures that are not compared
    unshared = {*first.measured} ^ {*run.measured}  # not compared either
    _check_texts(first, run, (ours | theirs) - beside - unshared)


def _check_texts(first: EvaluatedRun, run: EvaluatedRun, keys: set[str]) -> None:
    for key in sorted(keys):
        ours, theirs = first.conventions.get(key), run.conventions.get(key)
        if ours != theirs:
            raise UserError(
                f"{run.folder} and {first.folder} were scored by other conventions: {key} is {theirs!r} in the first and {ours!r} in the second; "
                "evaluate both with the same `evaluate:` section"
            )


def _check_cases(first: EvaluatedRun, run: EvaluatedRun, pattern: str) -> None:
    ours, theirs = first.scores[pattern], run.scores[pattern]
    for subject in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (first, run) if subject in ours else (run, first)
        raise UserError(
            f"{run.folder} and {first.folder} have other test sets: case {subject} ({pattern}) is in {has.folder} and not in {lacks.folder}; "
            "compare runs that were evaluated on the same data"
        )
    if run.keys != first.keys:
        ours, theirs = ", ".join(first.keys), ", ".join(run.keys)
        raise UserError(f"{run.folder} has regions {theirs} and {first.folder} {ours}; compare runs on one label scheme")


def _check_copies(runs: Sequence[EvaluatedRun]) -> None:
    """The copy of a sequence depends on the images alone: where it scores otherwise, the runs were measured against others."""
    found: dict[tuple[str, str, str], tuple[float, EvaluatedRun]] = {}
    for run in (one for run in runs for one in run.references if one.mark == FLOOR):
        for pattern, cases in run.scores.items():
            for subject, measures in cases.items():
                for key, score in measures.items():
                    value, other = found.setdefault((pattern, subject, key), (score.value, run))
                    if abs(value - score.value) > COPIES_AGREE:
                        raise UserError(
                            f"{run.folder} and {other.folder} were measured against other images: copying the source, {pattern}, scores {key} {score.value:.4f} in "
                            f"the first and {value:.4f} in the second on case {subject}; compare methods of one `intensity` on the same slices"
                        )


def _read_rows(path: Path, folder: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise UserError(f"{path}: no cases; run `mstkd evaluate {folder}` again")
    return rows


def _task(path: Path, rows: Sequence[Mapping[str, str]]) -> Task:
    for task in TASKS:
        if task.evidence in rows[0]:
            return task
    wanted, names = " nor ".join(task.evidence for task in TASKS), " and ".join(task.name for task in TASKS)
    raise UserError(f"{path}: neither {wanted}; only runs of {names} can be compared")


def _scores(task: Task, rows: Sequence[Mapping[str, str]], path: Path, folder: Path) -> Scores:
    scores: Scores = {}
    try:
        for row in rows:
            for pattern, key, score in task.scores(row):
                scores.setdefault(pattern, {}).setdefault(row["subject"], {})[key] = score
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); run `mstkd evaluate {folder}` again") from None
    return scores


def _check_agreement(evaluation: Path, task: Task, scores: Scores, summary: dict[str, Any]) -> None:
    """An evaluation that was cut short, or a file put in by hand, must not pass."""
    for pattern, key, mean, count in task.means(summary):
        cases = [case[key].value for case in scores.get(pattern, {}).values() if key in case and np.isfinite(case[key].value)]
        if len(cases) != count or (count and not np.isclose(np.mean(cases), mean, rtol=0, atol=1e-9)):
            raise UserError(f"{evaluation}: per_case.csv and summary.json disagree on {pattern}, {key}; run `mstkd evaluate` again")


def _copies(run: EvaluatedRun) -> list[EvaluatedRun]:
    """The copy of a given sequence, if the evaluation scored it; it must be on the run's own cases."""
    path = run.evaluation / COPY
    if not path.is_file():
        return []
    scores = _scores(run.task, _read_rows(path, run.trained), path, run.trained)
    cases, ours = ({(pattern, subject) for pattern, found in one.items() for subject in found} for one in (scores, run.scores))
    if cases != ours:
        raise UserError(f"{path}: holds other cases than per_case.csv; run `mstkd evaluate {run.trained}` again")
    return [replace(run, network="copy", scores=scores, notes={}, mark=FLOOR)]
