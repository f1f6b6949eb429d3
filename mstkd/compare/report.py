"""`compare.html`: every table and figure of a comparison in one file that needs nothing else."""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mstkd.compare import tables
from mstkd.compare.result import MEAN, Comparison
from mstkd.files import write_text


def write_report(path: Path, comparison: Comparison, drawn: dict[str, Path]) -> None:
    """One self-contained HTML file without subjects, patients or paths."""
    environment = Environment(loader=PackageLoader("mstkd.compare", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"p_text": tables.p_text, "family": tables.family}
    environment.filters["count"] = lambda value: "" if value is None else f"{value:,}"
    images = {caption: base64.b64encode(file.read_bytes()).decode() for caption, file in drawn.items()}
    html = environment.get_template("compare.html.j2").render(c=comparison, images=images, rows=[*comparison.patterns, MEAN], MEAN=MEAN)
    write_text(path, html)
