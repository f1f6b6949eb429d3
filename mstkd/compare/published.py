"""Rows of published tables, to be printed beside ours. Other data, other splits, other conventions: they are no ranking."""

from dataclasses import dataclass
from importlib import resources
from math import nan

import yaml

from mstkd.errors import UserError
from mstkd.recipe import nearest

ROUNDING = 0.1  # a mean of cells printed to 0.1 and a mean printed to 0.1 may differ by so much


@dataclass(frozen=True)
class Figures:
    """One printed cell: a score (Dice in per cent), HD95 as the paper counts it (NaN: not printed)."""

    score: float
    hd95: float = nan
    text: str = ""  # as printed


@dataclass(frozen=True)
class PublishedRow:
    """A method's figures in one region or measure."""

    cells: dict[frozenset[str], Figures]  # by the sequences given; empty: the paper was not legible, or prints averages only
    printed_mean: Figures
    recomputed_mean: Figures | None  # of the printed cells, where it is not what is printed

    def printed(self, subset: str) -> str:
        """The cell of a subset, by its name; empty where there is none."""
        cell = self.cells.get(frozenset(subset.split("+")))
        return cell.text if cell else ""


@dataclass(frozen=True)
class PublishedTable:
    name: str
    title: str
    source: str
    data: str
    conventions: str
    note: str
    rows: dict[str, dict[str, PublishedRow]]  # method -> region or measure

    @property
    def measures(self) -> list[str]:
        """Keys of the regions or measures that it has figures of."""
        return list(dict.fromkeys(key for measures in self.rows.values() for key in measures))

    @property
    def has_cells(self) -> bool:
        """Whether it has more than averages."""
        return any(row.cells for regions in self.rows.values() for row in regions.values())


def published_tables() -> dict[str, dict]:
    """The tables that come with the package, as in published.yaml."""
    return yaml.safe_load(resources.files("mstkd.compare").joinpath("published.yaml").read_text())


def read_published(name: str) -> PublishedTable:
    """The table called `name`. Raises UserError naming those there are."""
    tables = published_tables()
    if name not in tables:
        raise UserError(f"--published {name}: no such table{nearest(name, list(tables))}")
    table = tables[name]
    subsets = [frozenset(subset.split("+")) for subset in table.get("subsets", [])]
    rows = {method: {region: _row(row, subsets) for region, row in regions.items()} for method, regions in table["rows"].items()}
    return PublishedTable(name, table["title"], table["source"], table["data"], table["conventions"].strip(), table.get("note", ""), rows)


def _row(row: dict, subsets: list[frozenset[str]]) -> PublishedRow:
    cells = [_figures(text) for text in row.get("cells", "").split()]
    recomputed = row.get("recomputed_mean")
    return PublishedRow(
        dict(zip(subsets if cells else [], cells, strict=True)), _figures(row["printed_mean"]), None if recomputed is None else _figures(recomputed)
    )


def _figures(printed: str | float) -> Figures:
    """Of "68.6/4.5" (Dice and HD95) or "0.8477±0.0005"; what follows ± is shown and not used."""
    return Figures(*(float(part.partition("±")[0]) for part in str(printed).split("/")), text=str(printed).replace("/", " / "))
