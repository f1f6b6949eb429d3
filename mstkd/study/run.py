"""`mstkd study`: the cohort, the tuning, the runs and the comparison, each step done once."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from mstkd.compare.run import compare
from mstkd.compare.tasks import TASKS
from mstkd.config import RunConfig
from mstkd.errors import TrainingError, UserError
from mstkd.files import write_json
from mstkd.methods import load, read_config, stage_names
from mstkd.recipe import written_override
from mstkd.run_folder import check_prediction, leaves
from mstkd.study.cohort import prepare_cohort
from mstkd.study.config import StudyConfig, run_config
from mstkd.study.runs import AnotherEvaluation, StudyRun, alone, run_all
from mstkd.study.tracked import track, track_answer

Say = Callable[[str], None]


def run_study(study: StudyConfig, say: Say) -> Path:
    """Bring the study to its end, or as far as it gets; returns the comparison's folder. What is done already is not done again.

    Raises UserError on a recipe that does not fit what was begun, TrainingError once every run had its turn and some failed.
    """
    _check_methods(study)
    with alone(study.folder) as lock:
        shards = str(prepare_cohort(study.cohort, study.folder / "cohort", study.jobs)) if study.cohort else ""
        with track(study, shards) as tracker:
            chosen = tune(study, shards, lock, say)
            runs = _runs(study, shards, chosen)
            if failed := _bring_to_end(runs, study, lock, say):
                raise _failure(study, runs, failed)
            out = study.folder / "comparison"
            for name, question in study.comparisons.items():
                arms = {study.label(arm): [run.folder for run in runs if run.arm == arm] for arm in study.compared(question)}
                found = compare(arms, out / name, baseline=study.label(question.baseline), primary=study.label(question.method))
                track_answer(tracker, name, found)
            return out


def _runs(study: StudyConfig, shards: str, chosen: dict[str, dict[str, Any]]) -> list[StudyRun]:
    """Every arm with every seed, behind those whose networks it takes; last those that are other evaluations."""
    runs: list[StudyRun] = []
    again = {arm: declared.of for arm, declared in study.arms.items() if declared.of}
    for seed in study.seeds:
        of_seed: dict[str, StudyRun] = {}
        for arm, declared in study.arms.items():
            if arm in again:
                continue
            given = {network: of_seed[source] for network, source in declared.takes.items()}
            changes = [chosen[arm], *([{"teacher": {"path": {network: str(run.folder) for network, run in given.items()}}}] if given else [])]
            of_seed[arm] = _run(study, arm, shards, f"{arm}-seed{seed}", seed, "runs", *changes, after=tuple(given.values()))
        runs += of_seed.values()
        runs += [_another(study, arm, of_seed[of], shards, chosen[of]) for arm, of in again.items()]
    return runs


def tune(study: StudyConfig, shards: str, lock: IO, say: Say) -> dict[str, dict[str, Any]]:
    """By arm, the candidate with the best validation score; kept in tuning.json. Arms without candidates: {}.

    A candidate that diverges has no score. Raises TrainingError if no candidate of an arm has one.
    """
    runs = {
        arm: [_run(study, arm, shards, f"{arm}-{number}", study.tuning.seed, "tuning", candidate, _short(study)) for number, candidate in enumerate(declared.tune)]
        for arm, declared in study.arms.items()
    }  # fmt: skip
    candidates, noted = [run for arm in runs.values() for run in arm], study.folder / "tuning.json"
    scores = json.loads(noted.read_text()) if noted.is_file() else {}
    untried = [run for arm, found in runs.items() if len(scores.get(arm, {"scores": []})["scores"]) != len(found) for run in found]
    for run in candidates:
        run.check()
    failed = _bring_to_end(untried, study, lock, say) if untried else []
    for arm, found in runs.items():
        if set(found) & set(untried):
            values = [None if run in failed else run.best_score for run in found]
            finite = [value for value in values if value is not None and math.isfinite(value)]
            if not finite:
                raise _failure(study, found, [run for run in found if run in failed] or found)
            scores[arm] = {"scores": values, "chosen": values.index(max(finite))}
    write_json(noted, scores)
    return {arm: declared.tune[scores[arm]["chosen"]] if declared.tune else {} for arm, declared in study.arms.items()}


def _check_methods(study: StudyConfig) -> None:
    """Raise UserError where the arms' methods cannot be compared."""
    tasks = {arm: _checked_task(study, arm) for arm in study.arms}
    known, first = [task.name for task in TASKS], next(iter(study.comparisons.values())).baseline
    for arm, task in tasks.items():
        if task not in known:
            raise UserError(f"arm {arm}: its method is for {task}; a study compares methods for {' or '.join(known)}")
        if task != tasks[first]:
            raise UserError(f"arm {arm}: its method is for {task} and that of {first} for {tasks[first]}; the arms of a study share one task")


def _checked_task(study: StudyConfig, arm: str) -> str:
    """The task of an arm's method. Raises UserError if the method is not what its section says."""
    for candidate in study.arms[arm].tune or [{}]:
        values = run_config(study, arm, "check", "checked", 0, candidate)
        try:
            read_config(values["method"])
            stage_names(values["method"], values.get("stages"))
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from None
        method = load(values["method"]["name"])
        if study.arms[arm].of:
            _check_prediction(study, arm, method.sampling)
    return method.task


def _check_prediction(study: StudyConfig, arm: str, sampling: Sequence[str]) -> None:
    of = study.arms[arm].of
    before, now = (RunConfig.model_validate(run_config(study, one, "check", of, 0)) for one in (of, arm))
    try:
        check_prediction(before, now, sampling)
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None


def _short(study: StudyConfig) -> dict[str, Any]:
    """A candidate's training: validated once, at its end."""
    steps = study.tuning.steps
    return {"train": {"steps": steps, "epochs": None}, "validate": {"every_steps": steps}, "checkpoint": {"every_steps": steps}}


def _run(study: StudyConfig, arm: str, shards: str, name: str, seed: int, kind: str, *changes: dict[str, Any], after: tuple[StudyRun, ...] = ()) -> StudyRun:
    values = run_config(study, arm, shards, name, seed, *changes, {"runs_dir": str(study.folder / kind)})
    return StudyRun(arm, values, study.folder / "recipes" / kind, evaluate=kind == "runs" and arm in study.evaluated, after=after)


def _another(study: StudyConfig, arm: str, run: StudyRun, shards: str, chosen: dict[str, Any]) -> AnotherEvaluation:
    """What `arm` changes about how `run` predicts, as an evaluation of its own."""
    seed = run.values["seed"]
    values = run_config(study, arm, shards, f"{arm}-seed{seed}", seed, chosen, study.arms[arm].recipe, {"runs_dir": run.values["runs_dir"]})
    overrides = tuple(written_override(key, value) for key, value in leaves(study.arms[arm].recipe))
    return AnotherEvaluation(arm, values, run.notes, evaluate=True, after=(run,), overrides=overrides)


def _bring_to_end(runs: Sequence[StudyRun], study: StudyConfig, lock: IO, say: Say) -> list[StudyRun]:
    """Those that failed; first each run is checked against what it was begun with."""
    for run in runs:
        run.check()
    return run_all(runs, study.jobs, lock, say)


def _failure(study: StudyConfig, runs: Sequence[StudyRun], failed: Sequence[StudyRun]) -> TrainingError:
    names = ", ".join(run.name for run in failed)
    return TrainingError(f"study {study.name}: {len(failed)} of {len(runs)} runs failed: {names}; see {failed[0].log}, then give the same command again")
