"""Which runs a word on the command line names, and the ranking of a sweep's runs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from mstkd.errors import UserError
from mstkd.launch.status import UNREADABLE, RunFiles
from mstkd.recipe import nearest


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder: which keys it varies, and the folders of its runs, which may not all exist."""

    name: str
    axes: tuple[str, ...]
    members: tuple[Path, ...]


@dataclass(frozen=True)
class Target:
    """What a word on the command line names: runs; one job, or one array, of them; or a sweep."""

    word: str
    run_dirs: tuple[Path, ...]
    job: str | None = None
    sweep: Sweep | None = None

    def covers(self, id: str) -> bool:
        return self.job is None or self.job in (id, id.partition("_")[0])


def runs_below(runs_dir: Path) -> list[Path]:
    """The run folders in `runs_dir`, by name. Raises UserError if there is no such folder."""
    if not Path(runs_dir).is_dir():
        raise UserError(f"{runs_dir}: no such folder; point --runs-dir at the folder of the runs")
    return [folder for folder in sorted(Path(runs_dir).iterdir()) if is_run(folder)]


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "jobs.json", "attempts"))


def find(word: str, runs_dir: Path) -> Target:
    """The runs that `word` names: a folder, a name below `runs_dir`, or a job's id. Raises UserError if nothing does."""
    for folder in (Path(runs_dir) / word, Path(word)):
        if (folder / "sweep.json").is_file():
            sweep = read_sweep(folder.resolve())
            return Target(word, tuple(member for member in sweep.members if is_run(member)), sweep=sweep)
        if is_run(folder):
            return Target(word, (folder.resolve(),))
    if not re.fullmatch(r"\d+(_\d+)?", word):
        names = [path.parent.name for path in Path(runs_dir).glob("*/sweep.json")] + [run.name for run in runs_below(runs_dir)]
        hint = nearest(word, names) if names else ", which holds none; see --runs-dir"
        raise UserError(f"{word}: no such run or sweep in {runs_dir}{hint}")
    target = Target(word, (), job=word)
    holding = tuple(run.resolve() for run in runs_below(runs_dir) if any(target.covers(id) for id in _job_ids(run)))
    if not holding:
        raise UserError(f"job {word}: no run in {runs_dir} has it; see --runs-dir, or squeue for jobs that mstkd did not start")
    return Target(word, holding, job=word)


def _job_ids(run_dir: Path) -> list[str]:
    try:
        return RunFiles(run_dir).ids
    except UNREADABLE:
        return []  # one damaged folder must not stop the search in the others


def read_sweep(folder: Path) -> Sweep:
    """Raises UserError if its sweep.json is not one."""
    try:
        content = json.loads((folder / "sweep.json").read_text())
        return Sweep(folder.name, tuple(content["axes"]), tuple(folder.parent / name for name in content["runs"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'sweep.json'}: not a sweep; submit it again, or name its runs one by one") from None


@dataclass(frozen=True)
class Member:
    """A run of a sweep and its best validation score so far; None without one."""

    run_dir: Path
    values: tuple[str, ...]  # along the sweep's axes
    stage: str | None = None
    score: float | None = None
    step: int | None = None


def ranked(sweep: Sweep) -> list[Member]:
    """The members, best first as `mstkd.track.leading` says; those without a score in its stage come last, in the sweep's order."""
    from mstkd.track.leading import leading

    stage, scores = leading({run_dir: _best_scores(run_dir) for run_dir in sweep.members})
    best_first = [*scores, *(run_dir for run_dir in sweep.members if run_dir not in scores)]
    values = {run_dir: tuple(_value(run_dir, axis) for axis in sweep.axes) for run_dir in best_first}
    return [Member(run_dir, values[run_dir], *((stage, *scores[run_dir]) if run_dir in scores else ())) for run_dir in best_first]


def _best_scores(run_dir: Path) -> dict[str, tuple[float, int]]:
    """By stage: the best validation score and its step; {} if they cannot be read."""
    from mstkd.track.jsonl import read_records
    from mstkd.track.leading import SCORE, best_scores

    try:
        records = read_records(run_dir / "metrics.jsonl")
        return best_scores((record["stage"], record[SCORE], record["step"]) for record in records if record.get(SCORE) is not None)
    except UNREADABLE:  # its row says so; the other members are ranked all the same
        return {}


def _value(run_dir: Path, key: str) -> str:
    path = run_dir / "config.yaml"
    try:
        value = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    except UNREADABLE:
        return ""
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else str(value)
