"""`mstkd study`: the cohort, the tuning, the runs and the comparison, each step done once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mstkd.errors import TrainingError
from mstkd.compare.run import compare
from mstkd.study.cohort import prepare_cohort
from mstkd.study.config import StudyConfig, run_config
from mstkd.study.runs import StudyRun, run_all

Say = Callable[[str], None]


def run_study(study: StudyConfig, say: Say) -> Path:
    """Bring the study to its end, or as far as it gets; returns the comparison's folder. What is done already is not done again.

    Raises UserError on a recipe that does not fit what was begun, TrainingError once every run had its turn and some failed.
    """
    shards = str(prepare_cohort(study.cohort, study.folder / "cohort", study.jobs)) if study.cohort else ""
    chosen = tune(study, shards, say)
    runs = [_run(study, arm, shards, f"{arm}-seed{seed}", seed, "runs", chosen[arm]) for seed in study.seeds for arm in study.arms]
    _bring_to_end(runs, study, say)
    arms = {arm: [run.folder for run in runs if run.arm == arm] for arm in study.arms}
    out = study.folder / "comparison"
    compare(arms, out, baseline=study.baseline, primary=study.method)
    return out


def tune(study: StudyConfig, shards: str, say: Say) -> dict[str, dict[str, Any]]:
    """By arm, the candidate with the best validation score; kept in tuning.json. Arms without candidates: {}."""
    runs = {
        arm: [_run(study, arm, shards, f"{arm}-{number}", study.tuning.seed, "tuning", candidate, _short(study)) for number, candidate in enumerate(declared.tune)]
        for arm, declared in study.arms.items()
    }  # fmt: skip
    _bring_to_end([run for candidates in runs.values() for run in candidates], study, say)
    scores = {arm: [run.best_score for run in candidates] for arm, candidates in runs.items()}
    best = {arm: max(range(len(found)), key=found.__getitem__) if found else None for arm, found in scores.items()}
    study.folder.mkdir(parents=True, exist_ok=True)
    (study.folder / "tuning.json").write_text(json.dumps({arm: {"scores": scores[arm], "chosen": best[arm]} for arm in runs}, indent=1) + "\n")
    return {arm: {} if best[arm] is None else declared.tune[best[arm]] for arm, declared in study.arms.items()}


def _short(study: StudyConfig) -> dict[str, Any]:
    """A candidate's training: validated once, at its end."""
    steps = study.tuning.steps
    return {"train": {"steps": steps, "epochs": None}, "validate": {"every_steps": steps}, "checkpoint": {"every_steps": steps}}


def _run(study: StudyConfig, arm: str, shards: str, name: str, seed: int, kind: str, *changes: dict[str, Any]) -> StudyRun:
    values = run_config(study, arm, shards, name, seed, *changes, {"runs_dir": str(study.folder / kind)})
    return StudyRun(arm, values, study.folder / "recipes" / kind, evaluate=kind == "runs")


def _bring_to_end(runs: list[StudyRun], study: StudyConfig, say: Say) -> None:
    failed = run_all(runs, study.jobs, say)
    if failed:
        names = ", ".join(run.name for run in failed)
        raise TrainingError(f"study {study.name}: {len(failed)} of {len(runs)} runs failed: {names}; see {failed[0].log}, then give the same command again")
