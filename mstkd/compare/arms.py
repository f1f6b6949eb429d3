"""An arm: the runs of one recipe that differ only in seed, and for a method trained per subset also in that subset.

Beside the arms stand references, which are not ranked: oracles, and the copy of a given sequence.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mstkd.compare.runs import FLOOR, EvaluatedRun
from mstkd.compare.statistics import mean_finite
from mstkd.config import resolved
from mstkd.errors import UserError
from mstkd.measures import Measure
from mstkd.run_folder import FREE, leaves

OWN_SUBSET = "method.subset"  # of a method with one run per subset
# What does not make another arm: the seed, names, and what may change within one run. Another way of predicting does.
IGNORED = ({*FREE} | {"name", "seed"}) - {"inference", "teacher.path"}  # all of `evaluate` but what completes the input
COMPLETED = "evaluate.complete"
PATHS = ("teacher.path", "init_from", COMPLETED)
LABEL_KEYS = 2  # more differing keys than that: the run's own name is the shorter label


@dataclass(frozen=True)
class Arm:
    """Runs that are compared as one method. Scores (S seeds, P patients, U patterns, R measures), NaN where there is none."""

    label: str
    runs: tuple[EvaluatedRun, ...]
    seeds: tuple[int, ...]  # empty of what was not trained
    settings: dict[str, Any]  # where the arms differ
    patterns: tuple[bool, ...]  # per pattern of the comparison: whether every seed has it
    scores: NDArray[np.float64]
    beside: NDArray[np.float64]  # shown and not compared: HD95 in mm

    @property
    def notes(self) -> list[str]:
        """What the evaluations of its runs want known, each once."""
        return list(dict.fromkeys(f"{key}: {text}" for run in self.runs for key, text in run.notes.items()))

    @property
    def mark(self) -> str:
        """Why it is not ranked; empty if it is."""
        return next((run.mark for run in self.runs if run.mark), "")


@dataclass(frozen=True)
class Axes:
    """What the arms' arrays are laid out by."""

    patient: Mapping[str, str]  # subject -> patient
    patterns: tuple[str, ...]
    measures: tuple[Measure, ...]

    @property
    def patients(self) -> list[str]:
        return sorted({*self.patient.values()})


def group(runs: Sequence[EvaluatedRun]) -> dict[str, list[EvaluatedRun]]:
    """The runs by arm, in the order given, under labels made of what tells the arms apart."""
    arms: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        arms.setdefault(json.dumps([run.network, _settings(run)], sort_keys=True), []).append(run)
    return dict(zip(_labels(list(arms.values())), arms.values(), strict=True))


def check_arms(arms: Mapping[str, Sequence[EvaluatedRun]]) -> None:
    """Raise UserError where runs that are called one arm differ in more than seed and subset, or would count twice."""
    for label, runs in arms.items():
        if not runs:
            raise UserError(f"arm {label}: no runs")
        first = _settings(runs[0])
        taken: dict[tuple[int, str], EvaluatedRun] = {}
        for run in runs:
            settings = _settings(run)
            if run.network != runs[0].network:
                raise UserError(f"arm {label}: {run.folder} was scored by its {run.network} and {runs[0].folder} by its {runs[0].network}; evaluate both alike")
            for key in sorted({*first} | {*settings}):
                if first.get(key) != settings.get(key):
                    raise UserError(f"arm {label}: {run.folder} and {runs[0].folder} differ in {key}; an arm's runs differ only in seed")
            for pattern in run.scores:
                other = taken.setdefault((run.config.seed, pattern), run)
                if other is not run:
                    raise UserError(f"{run.folder} and {other.folder} have the same settings and seed {run.config.seed}; give one of them")


def common_axes(runs: Sequence[EvaluatedRun], patient: Mapping[str, str]) -> Axes:
    """Patterns in their usual order, measures as the first run has them, those that every run has."""
    task, found = runs[0].task, {pattern for run in runs for pattern in run.scores}
    usual = task.patterns(runs[0].data["sequences"])
    shared = set.intersection(*({*run.measured} for run in runs))
    return Axes(patient, (*(name for name in usual if name in found), *sorted(found - {*usual})), task.measures([key for key in runs[0].keys if key in shared]))


def with_references(groups: Mapping[str, Sequence[EvaluatedRun]]) -> dict[str, list[EvaluatedRun]]:
    """The arms, each with its oracles behind it, and at the end the copy of a given sequence, which is the same for all of them.

    Raises UserError where an arm is called like a reference.
    """
    arms: dict[str, list[EvaluatedRun]] = {}
    copies: dict[str, list[EvaluatedRun]] = {}
    for label, runs in groups.items():
        oracles: dict[str, list[EvaluatedRun]] = {}
        for one in (one for run in runs for one in run.references):
            place, name = (copies, one.network) if one.mark == FLOOR else (oracles, f"{label} {one.network}")
            place.setdefault(name, []).append(one)
        arms |= {label: list(runs), **oracles}
        if taken := [name for name in (*oracles, *copies) if name in groups]:
            raise UserError(f"arm {taken[0]}: a reference of the runs given is called so; call the arm by another name")
    return arms | copies


def build_arms(groups: Mapping[str, Sequence[EvaluatedRun]], axes: Axes) -> list[Arm]:
    """The arms with their scores, scans of a patient averaged. A pattern that some seed lacks is left out of its arm."""
    settings = {label: _settings(runs[0]) for label, runs in groups.items()}
    differing = _differing(list(settings.values()))
    arms = []
    for label, runs in groups.items():
        trained = runs[0].mark != FLOOR
        by_seed = defaultdict(list)
        for run in runs:
            by_seed[run.config.seed if trained else None].append(run)
        seeds = tuple(sorted(by_seed))
        scores, beside = (np.stack([_patient_means(by_seed[seed], axes, figure) for seed in seeds]) for figure in ("value", "beside"))
        has = np.isfinite(scores).any(axis=(1, 3)).all(axis=0)
        scores[:, :, ~has], beside[:, :, ~has] = np.nan, np.nan
        own = {key: settings[label].get(key) for key in differing if trained}
        arms.append(Arm(label, tuple(runs), seeds if trained else (), own, tuple(has.tolist()), scores, beside))
    return arms


def choose(arms: Sequence[Arm], wanted: str | None, option: str) -> Arm:
    """The arm called `wanted`, or the one that holds the run of that folder or name. Raises UserError naming the arms."""
    for arm in arms:
        if wanted == arm.label:
            return arm
    for arm in arms:
        if any(PurePath(wanted) == PurePath(run.folder) or wanted == run.name for run in arm.runs):
            return arm
    raise UserError(f"{option} {wanted}: neither an arm nor a run that was given; arms: {', '.join(arm.label for arm in arms)}")


def _patient_means(runs: Sequence[EvaluatedRun], axes: Axes, figure: str) -> NDArray[np.float64]:
    """(P, U, R) of `figure` of the scores: means over the scans of a patient."""
    patients, scans = axes.patients, sorted(axes.patient)
    values = np.full((len(scans), len(axes.patterns), len(axes.measures)), np.nan)
    row = {subject: number for number, subject in enumerate(scans)}
    for run in runs:
        for pattern, cases in run.scores.items():
            column = axes.patterns.index(pattern)
            for subject, measures in cases.items():
                values[row[subject], column] = [getattr(measures[measure.key], figure) for measure in axes.measures]
    owner = np.array([axes.patient[subject] for subject in scans])
    return np.stack([mean_finite(values[owner == patient], axis=0) for patient in patients])


def _settings(run: EvaluatedRun) -> dict[str, Any]:
    """What makes a run's recipe, by dotted key: without seed, names, places and what changes no update."""
    values = dict(leaves(resolved(run.config)))
    ignored = lambda key: any(fnmatchcase(key, free) or fnmatchcase(key, f"{free}.*") for free in IGNORED)  # noqa: E731
    place = lambda key: any(key == path or key.startswith(f"{path}.") for path in PATHS)  # noqa: E731
    kept = {key: value for key, value in values.items() if place(key) or not ignored(key)}
    for key in filter(place, kept):
        if kept[key]:  # each seed may have a teacher of its own
            kept[key] = without_seed(PurePath(kept[key]).name, run.config.seed)
    if [*run.scores] == [kept.get(OWN_SUBSET)]:
        del kept[OWN_SUBSET]
    return kept | {"data.set": f"{'+'.join(run.data['names'])} {run.data['digest'][:8]}"}


def without_seed(name: str, seed: int) -> str:
    """A run's name less what says its seed at the end: "kd-seed1", "kd_s1", "kd-1" -> "kd"."""
    return re.sub(rf"(?:[-_.](?:seed|s)?[-_.=]?|seed){seed}$", "", name) or name


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def _labels(arms: Sequence[Sequence[EvaluatedRun]]) -> list[str]:
    """Per arm: the method's name; with what differs from the method's first arm; or the runs' name less their seed."""
    by_method = defaultdict(list)
    for number, runs in enumerate(arms):
        by_method[runs[0].config.method["name"]].append(number)
    labels = [""] * len(arms)
    for method, numbers in by_method.items():
        settings = [_settings(arms[number][0]) for number in numbers]
        differing = _differing(settings)
        for number, own in zip(numbers, settings, strict=True):
            changed = [key for key in differing if own.get(key) != settings[0].get(key)]
            changed += [COMPLETED] * (own.get(COMPLETED) is not None and COMPLETED not in changed)  # a figure of completed input never passes for another
            labels[number] = " ".join([method, *(f"{_short(key, {*differing, *changed})}={_value(own.get(key))}" for key in changed)])
        names = [{without_seed(run.name, run.config.seed) for run in arms[number]} for number in numbers]
        telling = all(len(one) == 1 for one in names) and len(set().union(*names)) == len(names)
        if telling and len(differing) > LABEL_KEYS:
            for number, (name,) in zip(numbers, names, strict=True):
                labels[number] = name
    return labels if len({*labels}) == len(labels) else [f"{label} ({number})" for number, label in enumerate(labels, 1)]


def _short(key: str, keys: Collection[str]) -> str:
    """The last word of a dotted key, if no other key ends in it."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
