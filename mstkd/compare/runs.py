"""Evaluated runs as they lie on disk, and whether they may be compared: same cases, same conventions."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mstkd.config import RunConfig
from mstkd.errors import UserError
from mstkd.run_folder import best_steps, read_record, read_run_config

NOTES = ("overlap", "never trained", "postprocess")  # entries of summary["conventions"] that speak of the run, not of how figures are made


@dataclass(frozen=True)
class CaseScore:
    """What per_case.csv says of one case, subset and region; NaN where it was not measured."""

    dice: float
    hd95_mm: float
    truth_voxels: int


@dataclass(frozen=True)
class EvaluatedRun:
    """A run folder with its evaluation on the test split of its own data."""

    folder: Path
    config: RunConfig
    data: dict[str, Any]  # the record's data facts: names, sequences, digest
    network: str  # the one that the run is for
    scores: dict[str, dict[str, dict[str, CaseScore]]]  # subset -> subject -> region
    conventions: dict[str, str]
    notes: dict[str, str]
    oracle: bool  # it used the test cases' labels

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def subjects(self) -> list[str]:
        return sorted({subject for cases in self.scores.values() for subject in cases})

    @property
    def regions(self) -> list[str]:
        return list(next(iter(next(iter(self.scores.values())).values())))


def read_run(folder: Path) -> EvaluatedRun:
    """The evaluation in `folder`/evaluation. Raises UserError: no run, not evaluated, not a segmentation, files that disagree."""
    folder = Path(folder)
    config, data = read_run_config(folder), read_record(folder)["data"]
    rows_path, summary_path = (folder / "evaluation" / name for name in ("per_case.csv", "summary.json"))
    if not (rows_path.is_file() and summary_path.is_file()):
        raise UserError(f"{folder}: not evaluated on its test split yet; run `mstkd evaluate {folder}` first")
    if not evaluated_since(folder):
        raise UserError(f"{folder}: was trained on after its evaluation; run `mstkd evaluate {folder}` again")
    summary = json.loads(summary_path.read_text())
    network, scores = _read_scores(rows_path, folder)
    _check_agreement(folder, scores, summary)
    texts = summary["conventions"]
    return EvaluatedRun(
        folder, config, data, network, scores,
        {key: text for key, text in texts.items() if key not in NOTES},
        {key: text for key, text in texts.items() if key in NOTES},
        bool(summary.get("oracle")),
    )  # fmt: skip


def evaluated_since(folder: Path) -> bool:
    """Whether the evaluation in `folder`/evaluation is one of its present best weights; without a note of whose it is, it is taken as such."""
    noted = Path(folder) / "evaluation" / "weights.json"
    return not noted.is_file() or json.loads(noted.read_text()) == best_steps(folder)


def check_comparable(runs: Sequence[EvaluatedRun]) -> None:
    """Raise UserError naming the first case, label or convention in which two runs' evaluations differ."""
    first = runs[0]
    scored: dict[str, EvaluatedRun] = {}  # subset -> the first run that has it
    truth: dict[tuple[str, str], tuple[int, EvaluatedRun]] = {}
    for run in runs:
        _check_conventions(first, run)
        for subset, cases in run.scores.items():
            _check_cases(scored.setdefault(subset, run), run, subset)
            for subject, regions in cases.items():
                for region, score in regions.items():
                    voxels, other = truth.setdefault((subject, region), (score.truth_voxels, run))
                    if voxels != score.truth_voxels:
                        raise UserError(
                            f"{run.folder} and {other.folder} have other test sets: the truth of case {subject}, {region}, has "
                            f"{score.truth_voxels} and {voxels} voxels; compare runs that were evaluated on the same data"
                        )


def _check_conventions(first: EvaluatedRun, run: EvaluatedRun) -> None:
    added = [(run.config.evaluate.assd, run.config.evaluate.lesion_wise) for run in (first, run)]
    if added[0] != added[1]:
        return _check_texts(first, run, {*first.conventions} & {*run.conventions})  # only adds figures that are not compared
    return _check_texts(first, run, {*first.conventions} | {*run.conventions})


def _check_texts(first: EvaluatedRun, run: EvaluatedRun, keys: set[str]) -> None:
    for key in sorted(keys):
        ours, theirs = first.conventions.get(key), run.conventions.get(key)
        if ours != theirs:
            raise UserError(
                f"{run.folder} and {first.folder} were scored by other conventions: {key} is {theirs!r} in the first and {ours!r} in the second; "
                "evaluate both with the same `evaluate:` section"
            )


def _check_cases(first: EvaluatedRun, run: EvaluatedRun, subset: str) -> None:
    ours, theirs = first.scores[subset], run.scores[subset]
    for subject in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (first, run) if subject in ours else (run, first)
        raise UserError(
            f"{run.folder} and {first.folder} have other test sets: case {subject} ({subset}) is in {has.folder} and not in {lacks.folder}; "
            "compare runs that were evaluated on the same data"
        )
    if run.regions != first.regions:
        ours, theirs = ", ".join(first.regions), ", ".join(run.regions)
        raise UserError(f"{run.folder} has regions {theirs} and {first.folder} {ours}; compare runs on one label scheme")


def _read_scores(path: Path, folder: Path) -> tuple[str, dict[str, dict[str, dict[str, CaseScore]]]]:
    """(network, scores) of the network whose rows come first: the one in summary.json."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise UserError(f"{path}: no cases; run `mstkd evaluate {folder}` again")
    if "dice" not in rows[0]:
        raise UserError(f"{path}: no Dice; only segmentation runs can be compared")
    network, scores = rows[0]["network"], {}
    try:
        for row in rows:
            if row["network"] == network:
                score = CaseScore(float(row["dice"]), float(row["hd95_mm"] or "nan"), int(row["truth_voxels"]))
                scores.setdefault(row["subset"], {}).setdefault(row["subject"], {})[row["region"]] = score
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); run `mstkd evaluate {folder}` again") from None
    return network, scores


def _check_agreement(folder: Path, scores: dict[str, dict[str, dict[str, CaseScore]]], summary: dict[str, Any]) -> None:
    """An evaluation that was cut short, or a file put in by hand, must not pass."""
    for subset, regions in summary["subsets"].items():
        for region, cell in regions.items():
            cases = [case[region].dice for case in scores.get(subset, {}).values() if region in case]
            if len(cases) != cell["n"] or not np.isclose(np.mean(cases), cell["dice"], rtol=0, atol=1e-9):
                raise UserError(
                    f"{folder}/evaluation: per_case.csv and summary.json disagree on {subset}, {region}; run `mstkd evaluate {folder}` again"
                )
