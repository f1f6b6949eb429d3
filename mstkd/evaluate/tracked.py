"""An evaluation in MLflow: its figures, tables as the page shows them, files, and what the run says of itself."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.summary import COUNTS
from mstkd.evaluate.weights import TrainedRun
from mstkd.export.tracked import log_model
from mstkd.track import Tracker, open_evaluation
from mstkd.track.notes import markdown_table

MEAN = "mean"
SHOWN = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "accuracy": "accuracy", "auc": "AUC", "psnr": "PSNR (dB)", "ssim": "SSIM"}  # of a cell, in descriptions
CURVES = ("dice", "hd95_mm", "accuracy", "psnr", "ssim")  # drawn against the number of given sequences


def track(run: TrainedRun, folder: Path, summaries: dict[str, dict], source: CaseSource, subjects: int) -> None:
    """Keep an evaluation of `subjects` cases, written to `folder`, as a child of the run in MLflow."""
    name = folder.relative_to(run.folder).as_posix().replace("/", "-")
    with open_evaluation(run.config, run.folder, name) as tracker:
        split = next(iter(summaries.values()))["split"]
        title = f"{name}: {source.dataset}, {split} split, {subjects} cases"
        tracker.set_tags({"method": run.config.method["name"], "task": run.method.task, "data": source.dataset, "split": split})
        tracker.log_dataset({"name": source.dataset, "digest": source.digest, "profile": {"split": split, "cases": subjects}}, "testing")
        for network, summary in summaries.items():
            _log_figures(tracker, network, summary)
            tracker.log_table(subset_table(summary), f"tables/subsets_{network}.json")
        told = f"{mean_table(summaries)}\n\nMeans over what was given; every line of it is in the artifact `tables/subsets_{next(iter(summaries))}.json`."
        tracker.describe(f"{title}\n\n{told}")
        tracker.describe_run(told.replace("the artifact", f"the run `{run.config.name}/{name}`, artifact"), title)
        for path in sorted(folder.iterdir()):
            if path.is_file():
                tracker.log_artifact(path, "evaluation")
        if folder.name == "evaluation":  # of the run itself, once
            log_model(run, tracker)


def _log_figures(tracker: Tracker, network: str, summary: dict[str, Any]) -> None:
    """Every figure by name, and its mean by the number of given sequences, which is the step: one line per figure and region."""
    tracker.log_metrics({f"{network}/{name}": value for name, value in _figures(summary) if value is not None}, 0, "evaluation")
    curves: dict[int, dict[str, list[float]]] = {}
    for given, _, part, cell in _cells(summary):
        for key in CURVES:
            if cell.get(key) is not None:
                name = f"{network}/{key}_by_number_given/{part or MEAN}"
                curves.setdefault(given.count("+") + 1, {}).setdefault(name, []).append(cell[key])
    for number in sorted(curves):
        tracker.log_metrics({name: fmean(values) for name, values in curves[number].items()}, number, "evaluation")


def _figures(summary: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Figures by their names in MLflow, e.g. "dice/WT/flair+t1" or "psnr/t1->flair"; counts of single lines are in the tables alone."""
    lines, parts = ("patterns", False) if "patterns" in summary else ("subsets", True)
    for line, content in (*summary[lines].items(), (MEAN, summary[MEAN])):
        for part, cell in content.items() if parts else (("", content),):
            for key, value in cell.items():
                if line == MEAN or key not in COUNTS:
                    yield "/".join(filter(None, (key, part, line))), value


def _cells(summary: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(what was given, what of it was made, region or class, figures), by number of given sequences; the means are left out."""
    if "patterns" in summary:
        yield from ((*pattern.split("->"), "", cell) for pattern, cell in summary["patterns"].items())
    else:
        yield from ((subset, "", region, cell) for subset, regions in summary["subsets"].items() for region, cell in regions.items())


def subset_table(summary: dict[str, Any]) -> dict[str, list]:
    """A column per figure, a line per subset and region, class or pattern, from one given sequence to all, then the means."""
    synthesis = "patterns" in summary
    means = [(MEAN, MEAN, "", summary[MEAN])] if synthesis else [(MEAN, "", region, cell) for region, cell in summary[MEAN].items()]
    lines = [*_cells(summary), *means]
    keys = dict.fromkeys(key for *_, cell in lines for key in cell)
    table: dict[str, list] = {"number given": [None if given == MEAN else given.count("+") + 1 for given, *_ in lines], "given": [given for given, *_ in lines]}
    table |= {"made": [made for _, made, _, _ in lines]} if synthesis else {"region": [part for _, _, part, _ in lines]}
    return table | {key: [_rounded(cell.get(key)) for *_, cell in lines] for key in keys}


def mean_table(summaries: dict[str, dict[str, Any]]) -> str:
    """The means of every network in Markdown."""
    rows = []
    for network, summary in summaries.items():
        parts = {"": summary[MEAN]} if "patterns" in summary else summary[MEAN]
        name = f"{network} (oracle)" if summary.get("oracle") else network
        rows += [(name, part, cell) for part, cell in parts.items()]
    keys = [key for key in SHOWN if any(cell.get(key) is not None for *_, cell in rows)]
    parts = any(part for _, part, _ in rows)
    heads = ["network", *(["region"] if parts else []), *(SHOWN[key] for key in keys)]
    lines = [[name, *([part] if parts else []), *("-" if cell.get(key) is None else f"{cell[key]:.4g}" for key in keys)] for name, part, cell in rows]
    return markdown_table(heads, lines)


def _rounded(value: float | int | None) -> float | int | None:
    return round(value, 4) if isinstance(value, float) else value
