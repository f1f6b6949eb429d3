"""What a page says of a run beside its scores: cost, data, settings, provenance. No subject, patient, site, host or path."""

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mstkd import attempts
from mstkd.compare.costs import parameter_counts, prediction_cost, training_hours
from mstkd.compare.runs import NOTES
from mstkd.config import resolved
from mstkd.data.training import open_stores
from mstkd.errors import UserError
from mstkd.evaluate.source import split_subjects
from mstkd.recipe import run_params
from mstkd.report.entries import ReportedRun
from mstkd.run_folder import best_steps
from mstkd.shards.dataset_fingerprint import Fingerprint, PerAxis
from mstkd.shards.layout import FINGERPRINT
from mstkd.track.jsonl import read_records

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """The first column heads the rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def cost(runs: Sequence[ReportedRun]) -> Table:
    """A row per quantity, a column per run; rows of which no run says anything are left out."""
    found = [_cost(run) for run in runs]
    rows = [[name, *(one.get(name, "-") for one in found)] for name in dict.fromkeys(name for one in found for name in one)]
    note = "Wall time: from the start of each attempt to its last logged figure, validations included. A case: one prediction of it from one subset, on the machine that evaluated."
    return Table("", ["", *(run.label for run in runs)], rows, note)


def _cost(run: ReportedRun) -> dict[str, str]:
    counts, hours = parameter_counts(run.folder), training_hours(run.folder)
    records, tried = read_records(run.folder / "metrics.jsonl"), attempts.read(run.folder)
    timed = prediction_cost(run.folder / "evaluation", run.entries[0].network)
    last = {stage: max(record["step"] for record in part) for stage, part in groupby(records, lambda record: record["stage"])}

    def logged(name: str, over: Callable, form: str) -> str | None:
        values = [record[name] for record in records if record.get(name) is not None]
        return form.format(over(values)) if values else None

    texts = {
        "parameters of the scored network": _count(counts.get(run.entries[0].network)),
        "parameters of all trained networks": _count(sum(counts.values()) or None),
        "updates": ", ".join(f"{steps} ({stage})" for stage, steps in last.items()) or None,
        "training, wall time": None if hours is None else _duration(hours),
        "ranks": ", ".join(sorted({str(attempt.world_size) for attempt in tried})) or None,
        "samples per second, median": logged("time/samples_per_s", statistics.median, "{:.3g}"),
        "waiting for data, median": logged("time/data_wait_share", lambda values: 100 * statistics.median(values), "{:.1f} %"),
        "peak memory per rank": logged("memory/peak_gib", max, "{:.2f} GiB"),
        "computing per rank, median": logged("compute/tflop_per_s_per_rank", statistics.median, "{:.3g} TFLOP/s"),
        "one case": timed and f"{timed['seconds_per_case']:.3g} s ({timed['device'].upper()})",
    }
    return {name: text for name, text in texts.items() if text}


def _count(parameters: int | None) -> str | None:
    return parameters and f"{parameters:,}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def data(runs: Sequence[ReportedRun]) -> list[Table]:
    """Of each data that runs were trained on: what the record says, and the fingerprints of its shard sets if they are still there."""
    tables, seen = [], set()
    for run in runs:
        facts = run.data
        if facts["digest"] in seen:
            continue
        seen.add(facts["digest"])
        scheme = facts["label_scheme"]
        rows = [["sequences", ", ".join(facts["sequences"])], ["label scheme", scheme["name"] if isinstance(scheme, dict) else scheme or "-"]]
        rows += [["digest", facts["digest"]]]
        title = " + ".join(facts["names"])
        try:
            stores = open_stores(run.config.data)
        except (UserError, OSError) as error:
            log.warning("%s: no more is said of its data: %s", run.label, error)  # it names paths: not for the page
            tables.append(Table(title, ["", ""], rows, "The shard set cannot be read where the run found it, so there is no more to say."))
            continue
        fold = run.config.data.fold
        for split in ("train", "val", "test"):
            rows.append([f"{split}, fold {fold}", f"{sum(len(split_subjects(store, split, fold)) for store in stores)} subjects"])
        tables.append(Table(title, ["", ""], rows))
        for folder in (store.folder for store in stores if isinstance(store.folder, Path)):
            if (path := folder / FINGERPRINT).is_file():
                tables += _fingerprint(Fingerprint.model_validate(json.loads(path.read_text())))
    return tables


def _fingerprint(found: Fingerprint) -> list[Table]:
    whole = [
        ["subjects", f"{found.subjects} of {found.patients} patients, {found.labelled} with a label"],
        ["stored shape", f"{_axes(found.stored_shape)} voxels"], ["stored spacing", f"{_axes(found.stored_spacing_mm)} mm"],
        ["shape in the files", f"{_axes(found.file_shape)} voxels"], ["spacing in the files", f"{_axes(found.file_spacing_mm)} mm"],
        ["orientation of the files", _counted(found.orientations)], ["sequences that subjects have", _counted(found.subsets)],
        *([["sites", str(len(found.sites))]] if found.sites else []),
        *([["field strength, T", _counted(found.field_strengths_t)]] if found.field_strengths_t else []),
        ["warnings when it was built", str(len(found.warnings))],
    ]  # fmt: skip
    sequences = [
        [name, f"{one.subjects}", *(f"{one.intensity[key].median:.4g}" if one.intensity else "-" for key in ("mean", "std", "p0_5", "p99_5"))]
        for name, one in found.sequences.items()
    ]
    tables = [
        Table(f"{found.dataset}: the whole set", ["", ""], whole),
        Table("Intensities over the brain, as in the files, medians over subjects", ["sequence", "subjects", "mean", "sd", "0.5 %", "99.5 %"], sequences),
    ]
    if found.regions:
        volumes = [
            [name, f"{one.subjects}", str(one.absent), *(f"{getattr(one.volume_ml, key):.3g}" if one.volume_ml else "-" for key in ("min", "median", "max"))]
            for name, one in found.regions.items()
        ]
        tables.append(Table("Volumes of regions, ml", ["region", "subjects", "without it", "smallest", "median", "largest"], volumes))
    return tables


def _axes(axes: PerAxis) -> str:
    if axes.min == axes.max:
        return " × ".join(f"{value:.4g}" for value in axes.median)
    return " × ".join(f"{low:.4g} to {high:.4g}" for low, high in zip(axes.min, axes.max, strict=True))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def settings(runs: Sequence[ReportedRun]) -> list[Table]:
    """The resolved recipes without paths; of several runs first where they differ."""
    recipes = [{key: str(value) for key, value in run_params(resolved(run.config)).items()} for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    differ = [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]
    columns = ["key", *(run.label for run in runs)]

    def table(title: str, chosen: Sequence[str]) -> Table:
        return Table(title, columns, [[key, *(recipe.get(key, "") for recipe in recipes)] for key in chosen])

    if len(runs) == 1:
        return [table(f"{len(keys)} settings", keys)]
    same = Table(f"{len(keys) - len(differ)} settings that all share", ["key", "all"], [[key, recipes[0][key]] for key in keys if key not in differ])
    return [table(f"{len(differ)} settings that differ", differ), same]


def conventions(runs: Sequence[ReportedRun]) -> tuple[dict[str, str], dict[str, str]]:
    """How figures are made, and what is to be said of single runs: "overlap" and the like, by entry."""
    texts: dict[str, str] = {}
    notes: dict[str, str] = {}
    for entry in (entry for run in runs for entry in run.entries):
        for key, text in entry.summary["conventions"].items():
            if key in NOTES:
                notes[f"{entry.label}, {key}"] = text
            elif texts.setdefault(key, text) != text:
                texts[f"{key}, {entry.label}"] = text
    return texts, notes


def provenance(runs: Sequence[ReportedRun]) -> list[Table]:
    """Versions, commits and seeds by run, and the attempts; the reasons of their endings may name hosts and stay away."""
    rows = [
        ["commit", *(_commit(run) for run in runs)],
        ["uncommitted changes", *(_changes(run) for run in runs)],
        ["seed", *(str(run.record["seed"]) for run in runs)],
        ["best checkpoints", *(", ".join(f"{stage}: {step}" for stage, step in best_steps(run.folder).items()) or "-" for run in runs)],
        ["data digest", *(run.data["digest"][:16] for run in runs)],
        ["python", *(run.record.get("python", "-") for run in runs)],
    ]
    names = dict.fromkeys(name for run in runs for name in run.record.get("versions", {}))
    rows += [[name, *(run.record.get("versions", {}).get(name, "-") for run in runs)] for name in names]
    tried = []
    for run in runs:
        for attempt in attempts.read(run.folder):
            end = attempt.ending
            ended = f"{end.outcome}{f', {end.stage} step {end.step}' if end.stage else ''}" if end else "not noted"
            tried.append([f"{run.label}, {attempt.number}", attempt.started[:16].replace("T", " "), str(attempt.world_size), (attempt.commit or "-")[:12], ended])
    return [Table("", ["", *(run.label for run in runs)], rows), Table("Attempts", ["run, attempt", "started", "ranks", "commit", "ended"], tried)]


def _commit(run: ReportedRun) -> str:
    git = run.record.get("git")
    return git["commit"][:12] if git else "unknown"


def _changes(run: ReportedRun) -> str:
    git = run.record.get("git")
    return "-" if not git else "yes: the commit alone does not say what ran" if git["diff"] else "none"
