"""`mstkd report`: evaluated runs as one page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, evaluated, of one task.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: RUN/report.html; of several runs report-....html beside the first.")] = None,
) -> None:
    """Write one HTML page of evaluated runs: scores by given sequences, cases to look through, training, cost, data, provenance.

    The page needs nothing else, no network either, and names no subject, site, host or path.

    Example: mstkd report runs/mst_kdnet_phantom

    Example: mstkd report runs/mst_kdnet-seed0 runs/student_only-seed0 --out both.html
    """
    from mstkd.report.page import write_page

    typer.echo(f"report: {write_page(runs, out)}")
