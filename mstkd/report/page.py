"""`mstkd report RUN...`: what evaluated runs reached and how, in one HTML file that needs nothing else."""

import base64
from collections.abc import Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mstkd import __version__
from mstkd.files import write_text
from mstkd.measures import DICE
from mstkd.report import facts, figures, tables
from mstkd.report.entries import ReportedRun, read_runs
from mstkd.report.viewer import viewers

SERIES = 8  # colours of page.css; more entries begin again
TILES = ("parameters of the scored network", "updates", "training, wall time", "peak memory per rank", "one case")  # of the costs, with one run: seen at once
PICTURES = {"completed_*.png": "{} case: given, true and completed sequences, and their difference", "confusion_*.png": "{}: cases by true and decided class",
            "features.png": "Features of single sequences"}  # fmt: skip


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one or several run folders to `out`, by default report.html in the run or report-....html beside the first one; its path.

    Reads the run folders and, for the case viewers, weights and shards. The page holds no subject, patient or host and no path.
    Raises UserError: no run, not evaluated, runs of several tasks, an `out` whose folder is not there.
    """
    runs = read_runs(folders)
    path = Path(out) if out else _default(runs)
    content = _content(runs)
    environment = Environment(loader=PackageLoader("mstkd.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = DICE.dashed
    html = environment.get_template("page.html.j2").render(content)
    write_text(path, html)
    return path


def _default(runs: Sequence[ReportedRun]) -> Path:
    if len(runs) == 1:
        return runs[0].folder / "report.html"
    folders = [run.folder.resolve() for run in runs]
    named = "-and-".join(folder.name for folder in folders) if len(runs) == 2 else f"{len(runs)}-runs"
    return folders[0].parent / f"report-{named}.html"


def _content(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    first, task = runs[0], runs[0].task
    texts, notes = facts.conventions(runs)
    cost = facts.cost(runs)
    return {
        "title": first.label if len(runs) == 1 else f"{len(runs)} runs of {task.name}",
        "runs": runs, "task": task, "version": __version__, "today": date.today().isoformat(), "series": SERIES,
        "entries": [entry for run in runs for entry in run.entries],
        "cards": tables.cards(task, runs), "maps": tables.heat_maps(task, runs), "sequences": first.sequences,
        "curves": figures.curves(task, runs), "boxes": figures.boxes(task, runs), "of_a_case": task.of_a_case,
        "viewers": viewers(runs), "pictures": _pictures(runs), "training": figures.training(runs),
        "cost": cost, "tiles": [row for row in cost.rows if row[0] in TILES] if len(runs) == 1 else [], "data": facts.data(runs), "settings": facts.settings(runs), "provenance": facts.provenance(runs),
        "conventions": texts, "notes": notes, "same_data": len({run.data["digest"] for run in runs}) == 1,
        **{name: Markup(resources.files("mstkd.report").joinpath(file).read_text("utf-8"))
           for name, file in (("style", "page.css"), ("dark", "dark.css"), ("script", "page.js"), ("viewer_script", "viewer.js"))},
    }  # fmt: skip


def _pictures(runs: Sequence[ReportedRun]) -> dict[str, str]:
    """Caption -> PNG in base64: what the evaluation drew of tasks whose cases have no viewer; no name of a subject is in them."""
    found = {}
    for run in runs:
        for pattern, caption in PICTURES.items():
            for path in sorted((run.folder / "evaluation").glob(pattern)):
                words = caption.format(path.stem.partition("_")[2].capitalize())
                found[words if len(runs) == 1 else f"{run.label}: {words}"] = base64.b64encode(path.read_bytes()).decode()
    return found
