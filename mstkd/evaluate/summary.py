"""From rows to `per_case.csv`, `summary.json` and the table in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mstkd.evaluate.cases import Row
from mstkd.evaluate.scoring import Score
from mstkd.files import write_csv
from mstkd.measures import ASSD, DICE, HD95, Unit
from mstkd.subsets import all_subsets, subset_name

COUNTS = ("n", "n_nonempty", "false_positive_cases", "hd95_n", "missed")
BESIDE = {
    "sensitivity": Unit("sensitivity %", factor=100),
    "specificity": Unit("specificity %", factor=100, digits=3),
    "truth_ml": Unit("truth ml"),
    "predicted_ml": Unit("predicted ml"),
    "volume_error_ml": Unit("error ml", signs=True),
    "absolute_volume_error_ml": Unit("|error| ml"),
    "assd_mm": ASSD,
    "lesion_dice": Unit("lesion Dice %", factor=100),
    "lesion_hd95_mm": Unit("lesion HD95 mm"),
    "ece": Unit("ECE %", factor=100, digits=3),
}


def summarise(
    rows: Sequence[Row], sequences: Sequence[str], method: str | None, split: str, fold: int | None, conventions: dict[str, str]
) -> dict[str, Any]:
    """The content of `summary.json` for the rows of one network; subsets of `sequences` in their usual order.

    Fractions are 0..1, distances mm; a mean over no case is None.
    """
    cells: dict[str, dict[str, list[Score]]] = {}
    for row in rows:
        cells.setdefault(row.subset, {}).setdefault(row.region, []).append(row.score)
    usual = [subset_name(sequences, subset) for subset in all_subsets(sequences)]
    order = [name for name in usual if name in cells] + [name for name in cells if name not in usual]
    subsets = {name: {region: _cell(scores) for region, scores in cells[name].items()} for name in order}
    regions = dict.fromkeys(row.region for row in rows)
    mean = {region: mean_cell([subset[region] for subset in subsets.values()]) for region in regions}
    return {"method": method, "split": split, "fold": fold, "subsets": subsets, "mean": mean, "conventions": conventions}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """`per_case.csv`: one line per network x case x subset x region; an empty field was not measured."""
    columns = ("network", "subject", "subset", "region", *Score.__dataclass_fields__)
    write_csv(path, columns, ((row.network, row.subject, row.subset, row.region, *vars(row.score).values()) for row in rows))


def print_table(summary: dict[str, Any], title: str, console: Console | None = None) -> None:
    """One line per subset: Dice in per cent and HD95 in mm per region; what stands beside them as means; n and the conventions below."""
    console = console or Console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("given", no_wrap=True)
    regions = list(summary["mean"])
    for region in regions:
        for heading in (f"{region}\nDice", "non-\nempty", "HD95\nmm"):
            table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in summary["subsets"].items():
        table.add_row(name, *_texts(cells, regions))
    table.add_section()
    table.add_row("mean", *_texts(summary["mean"], regions), style="bold")
    console.print(table)
    if columns := beside(summary):
        means = Table(title="mean over the lines above", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("region", *(unit.heading for unit in columns.values())):
            means.add_column(heading, justify="left" if heading == "region" else "right")
        for region, cell in summary["mean"].items():
            means.add_row(region, *(unit.dashed(cell[key]) for key, unit in columns.items()))
        console.print(means)
    for key, text in {"n": counted(summary), **summary["conventions"]}.items():
        console.print(f"{key}: {text}", style="dim", highlight=False, markup=False)


def beside(summary: dict[str, Any]) -> dict[str, Unit]:
    """What a summary says beside Dice and HD95, and beside counts: key -> unit."""
    cell = next(iter(summary["mean"].values()), {})
    return {key: unit for key, unit in BESIDE.items() if key in cell}


def counted(summary: dict[str, Any]) -> str:
    """How many cases the lines of a summary are means over, and how many of them have something in a region."""

    def cases(region: str, key: str) -> str:
        numbers = sorted({cells[region][key] for cells in summary["subsets"].values()})
        return " to ".join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1])))

    regions = list(summary["mean"])
    if not regions:
        return "no cases"
    return f"{cases(regions[0], 'n')} cases per line; truth non-empty in " + ", ".join(f"{region} {cases(region, 'n_nonempty')}" for region in regions)


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that are not None; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_cell(cells: Sequence[dict[str, float | int | None]], counts: Sequence[str] = COUNTS) -> dict[str, float | int | None]:
    """The unweighted means of a summary's cells; `counts` are summed."""
    return {key: sum(c[key] for c in cells) if key in counts else mean_known([c[key] for c in cells]) for key in cells[0]}


def _texts(cells: dict[str, dict], regions: Sequence[str]) -> list[str]:
    texts = []
    for region in regions:
        cell = cells[region]
        texts += [DICE.dashed(cell["dice"]), DICE.dashed(cell["dice_nonempty"]), HD95.dashed(cell["hd95_mm"])]
    return texts


def _cell(scores: list[Score]) -> dict[str, float | int | None]:
    truth = [score for score in scores if score.truth_voxels]
    both = [score for score in truth if score.predicted_voxels]
    cell = {
        "dice": mean_known([score.dice for score in scores]),
        "dice_nonempty": mean_known([score.dice for score in truth]),
        "n": len(scores),
        "n_nonempty": len(truth),
        "false_positive_cases": sum(not score.truth_voxels and score.predicted_voxels > 0 for score in scores),
        "hd95_mm": mean_known([score.hd95_mm for score in scores]),
        "hd95_nonempty_mm": mean_known([score.hd95_mm for score in both]),
        "hd95_n": len(both),
        "missed": len(truth) - len(both),
    }
    return cell | _beside(scores, truth, both)


def _beside(scores: list[Score], truth: list[Score], both: list[Score]) -> dict[str, float | None]:
    """The figures that stand beside Dice and HD95, as far as they were measured."""

    def measured(key: str) -> list[float]:
        return [value for score in scores if (value := getattr(score, key)) is not None]

    cell: dict[str, float | None] = {}
    if measured("truth_ml"):
        errors = [score.predicted_ml - score.truth_ml for score in scores]
        cell |= {"sensitivity": mean_known([score.sensitivity for score in truth])}
        cell |= {key: mean_known(measured(key)) for key in ("specificity", "truth_ml", "predicted_ml")}
        cell |= {"volume_error_ml": mean_known(errors), "absolute_volume_error_ml": mean_known(np.abs(errors).tolist())}
    if measured("assd_mm"):
        cell |= {"assd_mm": mean_known(measured("assd_mm")), "assd_nonempty_mm": mean_known([score.assd_mm for score in both])}
    for key in ("lesion_dice", "lesion_hd95_mm", "ece"):
        if measured(key):
            cell[key] = mean_known(measured(key))
    return cell
