"""A comparison as `compare.csv` and `primary.csv`, and as a table in the terminal."""

import csv
import os
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mstkd.compare.published import Figures
from mstkd.compare.result import Comparison, Estimate, PairedTest

COST_COLUMNS = ("scored_parameters", "trained_parameters", "hours", "seconds_per_case")
CELL_COLUMNS = ("arm", "subset", "region", "n_patients", "seeds", "dice", "dice_low", "dice_high", "difference", "difference_low",
                "difference_high", "p_exploratory", "hd95_mm", *COST_COLUMNS)  # fmt: skip
TEST_COLUMNS = ("arm", "baseline", "region", "family", "n_patients", "n_subsets", "difference", "difference_low", "difference_high", "seed_sd",
                "baseline_seed_sd", "p", "p_holm", "test", *COST_COLUMNS)  # fmt: skip


def write_tables(comparison: Comparison) -> list[Path]:
    """compare.csv: a line per arm x subset (and mean) x region. primary.csv: a line per test. Fractions 0..1, an empty field is unknown."""
    rows = [
        (c.arm, c.subset, c.region, c.patients, c.seeds, *_parts(c.dice), *_parts(c.difference), c.p, None if isnan(c.hd95_mm) else c.hd95_mm,
         *_costs(comparison, c.arm))
        for c in comparison.cells.values()
    ]
    tests = [
        (t.arm, t.baseline, t.region, family(t), t.patients, t.subsets, *_parts(t.difference), t.seed_sd, t.baseline_seed_sd, t.p, t.p_holm, t.says,
         *_costs(comparison, t.arm))
        for t in comparison.tests
    ]
    paths = [comparison.out / "compare.csv", comparison.out / "primary.csv"]
    _write(paths[0], CELL_COLUMNS, rows)
    _write(paths[1], TEST_COLUMNS, tests)
    return paths


def _costs(comparison: Comparison, arm: str) -> list[float | None]:
    return [getattr(comparison.arms[arm].costs, column) for column in COST_COLUMNS]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Arms x regions: mean Dice, difference to the baseline with its interval, p; below it what the figures mean."""
    console = console or Console()
    console.print(f"Dice % over subsets, against {comparison.baseline}", markup=False, highlight=False)
    table = _table("Dice", "difference [95 %]", "seed sd", "p, Holm")
    tests = {(test.arm, test.region): test for test in comparison.tests}
    for label, arm in comparison.arms.items():
        table.add_section()
        for region in comparison.regions:
            cell, test = comparison.mean(label, region), tests.get((label, region))
            name = label + " (oracle)" * arm.oracle if region == comparison.regions[0] else ""
            spread = percent(arm.seed_sd[region]) if arm.seed_sd else "1 seed"
            p = p_text(test.p_holm) + " expl." * (not test.primary) if test else ""
            table.add_row(name, region, percent(cell.dice.value), points(cell.difference), spread, p)
    console.print(table)
    for published in comparison.published:
        console.print(f"{published.name}, as printed: conventions differ", markup=False, highlight=False)
        table = _table("Dice", "HD95")
        for method, rows in published.rows.items():
            table.add_section()
            for region, row in rows.items():
                dice, _, hd95 = printed(row.printed_mean).partition(" / ")
                table.add_row(method if region == next(iter(rows)) else "", region, dice, hd95)
        console.print(table)
    for key, text in (comparison.facts | comparison.conventions).items():
        console.print(f"{key}: {text}", style="dim", highlight=False, markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    table.add_column("region")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def family(test: PairedTest) -> str:
    return "primary" if test.primary else "exploratory"


def percent(value: float | None) -> str:
    return "" if value is None or isnan(value) else f"{100 * value:.1f}"


def points(difference: Estimate | None) -> str:
    """A difference in percentage points with its interval."""
    if difference is None:
        return ""
    return f"{signed(difference.value)} {signed_span(difference)}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def signed_span(estimate: Estimate) -> str:
    return f"[{signed(estimate.low)}, {signed(estimate.high)}]"


def span(estimate: Estimate) -> str:
    return f"[{percent(estimate.low)}, {percent(estimate.high)}]"


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def printed(figures: Figures | None) -> str:
    """A published cell as the paper prints it: Dice % / HD95."""
    if figures is None:
        return ""
    return " / ".join(str(value) for value in (figures.dice_percent, figures.hd95) if not isnan(value))


def _parts(estimate: Estimate | None) -> Sequence[float | None]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
    os.replace(partial, path)
