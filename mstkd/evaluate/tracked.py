"""An evaluation in MLflow: its figures, tables as the page shows them, files, and what the run says of itself."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from mstkd.evaluate.cases import PRESENT
from mstkd.evaluate.source import CaseSource
from mstkd.export.tracked import log_model
from mstkd.run_folder import read_record
from mstkd.track import Tracker, open_evaluation
from mstkd.track.notes import markdown_table
from mstkd.trained_run import TrainedRun

MEAN = "mean"
SHOWN = {  # the figures of a cell that have charts for every line; of the others MLflow has the means, and the table
    "dice": "Dice", "dice_nonempty": "Dice (non-empty)", "hd95_mm": "HD95 (mm)", "accuracy": "accuracy", "auc": "AUC", "psnr": "PSNR (dB)", "ssim": "SSIM",
}  # fmt: skip


def track(run: TrainedRun, folder: Path, summaries: dict[str, dict], source: CaseSource, subjects: int) -> None:
    """Keep an evaluation of `subjects` cases, written to `folder`, as a child of the run in MLflow."""
    name = folder.relative_to(run.folder).as_posix().replace("/", "-")
    with open_evaluation(run.config, run.folder, name) as tracker:
        split = next(iter(summaries.values()))["split"]
        title = f"{name}: {source.dataset}, {split} split, {subjects} cases"
        tracker.set_tags({"method": run.config.method["name"], "task": run.method.task, "data": source.dataset, "split": split, "cases": subjects})
        digest = read_record(run.folder)["data"]["digest"] if source is run.source else source.digest  # the same set, the same name on the page
        tracker.log_dataset({"name": source.dataset, "digest": digest}, "testing")
        for network, summary in summaries.items():
            _log_figures(tracker, network, summary)
            tracker.log_table(subset_table(summary), f"tables/subsets_{network}.json")
        told = f"{mean_table(summaries)}\n\nMeans over what was given; every line of it is in the artifact `tables/subsets_{next(iter(summaries))}.json`."
        tracker.describe(f"{title}\n\n{told}")
        whole = tracker.whole_run()
        whole.describe(told.replace("the artifact", f"the run `{run.config.name}/{name}`, artifact"), title)
        if folder.name == "evaluation":  # of the run itself: columns of the page's table of runs
            whole.log_metrics(dict(_headlines(split, summaries)), 0, "evaluation")
        for path in sorted(folder.iterdir()):
            if path.is_file():
                tracker.log_artifact(path, "evaluation")
        if folder.name == "evaluation":  # of the run itself, once
            log_model(run, tracker)


def _log_figures(tracker: Tracker, network: str, summary: dict[str, Any]) -> None:
    """Figures by name, and their means by the number of given sequences, which is the step: one curve per figure and region."""
    tracker.log_metrics({f"{network}/{name}": value for name, value in _figures(summary)}, 0, "evaluation")
    curves: dict[int, dict[str, list[float]]] = {}
    for given, _, part, cell in _cells(summary):
        for key in (key for key in SHOWN if cell.get(key) is not None):
            name = f"{network}/by_number_given/{'_'.join(filter(None, (key, part)))}"
            curves.setdefault(_number(given) or 0, {}).setdefault(name, []).append(cell[key])
    for number in sorted(curves.keys() - {0}):
        tracker.log_metrics({name: fmean(values) for name, values in curves[number].items()}, number, "evaluation")


def _figures(summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Figures by their names in MLflow, e.g. "dice/WT/flair+t1" or "psnr/t1->flair"; of those that are not `SHOWN` the means, in one group behind."""
    for part, cell in _means(summary):
        for key, value in cell.items():
            if value is not None:
                yield "/".join(filter(None, (key, part, MEAN))) if key in SHOWN else f"others/{'_'.join(filter(None, (key, part)))}", value
    for given, made, part, cell in _cells(summary):
        line = f"{given}->{made}" if made else given
        yield from (("/".join(filter(None, (key, part, line))), cell[key]) for key in SHOWN if cell.get(key) is not None)


def _headlines(split: str, summaries: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """The means of what is `SHOWN`, e.g. "test/student/dice_WT"."""
    for network, summary in summaries.items():
        for part, cell in _means(summary):
            yield from ((f"{split}/{network}/{'_'.join(filter(None, (key, part)))}", cell[key]) for key in SHOWN if cell.get(key) is not None)


def _means(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(region or class, figures) over all that was given."""
    return [("", summary[MEAN])] if "patterns" in summary else list(summary[MEAN].items())


def _cells(summary: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(what was given, what of it was made, region or class, figures), by number of given sequences; the means are left out."""
    if "patterns" in summary:
        yield from ((*pattern.split("->"), "", cell) for pattern, cell in summary["patterns"].items())
    else:
        yield from ((subset, "", region, cell) for subset, regions in summary["subsets"].items() for region, cell in regions.items())


def subset_table(summary: dict[str, Any]) -> dict[str, list]:
    """A column per figure, a line per subset and region, class or pattern, from one given sequence to all, then the means."""
    synthesis = "patterns" in summary
    lines = [*_cells(summary), *((MEAN, MEAN, part, cell) for part, cell in _means(summary))]
    keys = dict.fromkeys(key for *_, cell in lines for key in cell)
    table: dict[str, list] = {"number given": [_number(given) for given, *_ in lines], "given": [given for given, *_ in lines]}
    table |= {"made": [made for _, made, _, _ in lines]} if synthesis else {"region": [part for _, _, part, _ in lines]}
    return table | {key: [_rounded(cell.get(key)) for *_, cell in lines] for key in keys}


def mean_table(summaries: dict[str, dict[str, Any]]) -> str:
    """The means of every network in Markdown."""
    rows = []
    for network, summary in summaries.items():
        name = f"{network} (oracle)" if summary.get("oracle") else network
        rows += [(name, part, cell) for part, cell in _means(summary)]
    keys = [key for key in SHOWN if any(cell.get(key) is not None for *_, cell in rows)]
    parts = any(part for _, part, _ in rows)
    heads = ["network", *(["region"] if parts else []), *(SHOWN[key] for key in keys)]
    lines = [[name, *([part] if parts else []), *("-" if cell.get(key) is None else f"{cell[key]:.4g}" for key in keys)] for name, part, cell in rows]
    return markdown_table(heads, lines)


def _number(given: str) -> int | None:
    """How many sequences or views a line was given, where that is the same for all cases."""
    return None if given in (MEAN, PRESENT) else given.count("+") + 1


def _rounded(value: float | int | None) -> float | int | None:
    return round(value, 4) if isinstance(value, float) else value
