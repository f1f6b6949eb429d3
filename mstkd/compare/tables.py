"""A comparison as `compare.csv` and `primary.csv`, and as a table in the terminal."""

import csv
from collections.abc import Sequence
from math import isnan
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mstkd.compare.published import PublishedTable
from mstkd.compare.result import MEAN, Comparison, PairedTest
from mstkd.compare.tasks import Task
from mstkd.files import write_csv
from mstkd.measures import Estimate
from mstkd.track.notes import markdown_table

COST_COLUMNS = ("scored_parameters", "trained_parameters", "hours", "seconds_per_case")
DIFFERENCE_COLUMNS = ("difference", "difference_low", "difference_high")


def write_tables(comparison: Comparison) -> list[Path]:
    """compare.csv: a line per arm x pattern (and mean) x measure. primary.csv: a line per test. Fractions 0..1, an empty field is unknown."""
    task = comparison.task
    score, *beside = task.columns
    columns = ("arm", task.pattern, task.measure, "n_patients", "seeds", score, f"{score}_low", f"{score}_high", *DIFFERENCE_COLUMNS,
               "p_exploratory", *beside, *COST_COLUMNS)  # fmt: skip
    rows = [
        (c.arm, c.pattern, c.measure, c.patients, c.seeds, *_parts(c.score), *_parts(c.difference), c.p,
         *(None if isnan(c.beside) else c.beside for _ in beside), *_costs(comparison, c.arm))
        for c in comparison.cells.values()
    ]  # fmt: skip
    test_columns = ("arm", "baseline", task.measure, "family", "n_patients", f"n_{task.pattern}s", *DIFFERENCE_COLUMNS, "seed_sd",
                    "baseline_seed_sd", "p", "p_holm", "test", *COST_COLUMNS)  # fmt: skip
    tests = [
        (t.arm, t.baseline, t.measure, family(t), t.patients, t.patterns, *_parts(t.difference), t.seed_sd, t.baseline_seed_sd, t.p, t.p_holm, t.says,
         *_costs(comparison, t.arm))
        for t in comparison.tests
    ]  # fmt: skip
    paths = [comparison.out / "compare.csv", comparison.out / "primary.csv"]
    write_csv(paths[0], columns, rows)
    write_csv(paths[1], test_columns, tests)
    return paths


def read_columns(path: Path) -> dict[str, list]:
    """A written table by column: numbers as such, an empty field as None."""
    with path.open(newline="") as file:
        heads, *rows = csv.reader(file)
    return {head: [_value(row[number]) for row in rows] for number, head in enumerate(heads)}


def _value(text: str) -> str | float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _costs(comparison: Comparison, arm: str) -> list[float | None]:
    return [getattr(comparison.arms[arm].costs, column) for column in COST_COLUMNS]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Arms x measures: mean, difference to the baseline with its interval, p; below it what the figures mean."""
    console, task = console or Console(), comparison.task
    console.print(f"{task.title} over {task.pattern}s, against {comparison.baseline}", markup=False, highlight=False)
    table = _table(task, task.score, "difference [95 %]", "seed sd", "p, Holm")
    tests = {(test.arm, test.measure): test for test in comparison.tests}
    for label, arm in comparison.arms.items():
        table.add_section()
        for number, measure in enumerate(comparison.measures):
            cell, test = comparison.cells.get((label, MEAN, measure.key)), tests.get((label, measure.key))
            name = "" if number else label + f" ({arm.mark})" * bool(arm.mark)
            spread = measure.unit.text(arm.seed_sd[measure.key]) if arm.seed_sd else "1 seed" * bool(arm.seeds)
            figures = (measure.unit.text(cell.score.value), measure.unit.difference(cell.difference)) if cell else ("", "")
            table.add_row(name, measure.title, *figures, spread, _p(test) if test else "")
    console.print(table)
    for published in comparison.published:
        _print_published(published, comparison, console)
    for key, text in (comparison.facts | comparison.conventions).items():
        console.print(f"{key}: {text}", style="dim", highlight=False, markup=False)


def markdown(comparison: Comparison) -> str:
    """The means and their differences to the baseline, for a description."""
    task, rows = comparison.task, []
    tests = {(test.arm, test.measure): test for test in comparison.tests}
    for label, arm in comparison.arms.items():
        for measure in comparison.measures:
            if (cell := comparison.cells.get((label, MEAN, measure.key))) is None:
                continue
            test, name = tests.get((label, measure.key)), label + f" ({arm.mark})" * bool(arm.mark)
            rows.append([name, measure.title, measure.unit.text(cell.score.value), measure.unit.difference(cell.difference), _p(test) if test else ""])
    head = f"{task.title} over {task.pattern}s, against {comparison.baseline}; whole in the artifacts `tables/` and `compare/compare.html`."
    return f"{head}\n\n{markdown_table(['arm', task.measure, task.score, 'difference [95 %]', 'p, Holm'], rows)}"


def _print_published(published: PublishedTable, comparison: Comparison, console: Console) -> None:
    console.print(f"{published.name}, as printed: conventions differ", markup=False, highlight=False)
    titles = {measure.key: measure.title for measure in comparison.task.measures(published.measures)}
    columns = comparison.task.printed
    table = _table(comparison.task, *(column.removesuffix(" %") for column in columns))
    for method, rows in published.rows.items():
        table.add_section()
        for key, row in rows.items():
            parts = row.printed_mean.text.split(" / ")
            table.add_row(method if key == next(iter(rows)) else "", titles[key], *parts, *[""] * (len(columns) - len(parts)))
    console.print(table)


def _p(test: PairedTest) -> str:
    """The adjusted p value, or that of a measure that no adjustment takes in."""
    return p_text(test.p if test.p_holm is None else test.p_holm) + " expl." * (not test.primary)


def _table(task: Task, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    table.add_column(task.measure, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def family(test: PairedTest) -> str:
    return "primary" if test.primary else "exploratory"


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _parts(estimate: Estimate | None) -> Sequence[float | None]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
