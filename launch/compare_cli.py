"""`mstkd compare`: evaluated runs side by side."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, evaluated, or another evaluation in one; those that differ only in seed form one arm.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN-OR-ARM", help="What the others are compared with. Default: the first run's arm.")
    ] = None,
    primary: Annotated[
        str | None, typer.Option(metavar="RUN-OR-ARM", help="With several arms: the one whose tests were fixed before looking. Default: each.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where results go. Default: compare-... beside the first run.")] = None,
    published: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Print a paper's table beside ours, e.g. mst_kdnet_brats2024 or utad_brats2020; may be repeated.")
    ] = None,
    shards: Annotated[str | None, typer.Option(metavar="DIR", help="The test cases' shard set, if it is not where the runs found it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", min=0)] = 0,
) -> None:
    """Compare evaluated runs of segmentation or of synthesis on their common test set: means, differences with intervals, paired tests, figures.

    Example: mstkd compare runs/kd-seed* runs/mst_kdnet-seed* --baseline kd

    Example: mstkd compare runs/kd runs/mst_kdnet --published mst_kdnet_brats2024 --out comparison

    Example: mstkd compare runs/stargan-seed* runs/utad_net-seed* --published utad_brats2020
    """
    from mstkd.compare.run import compare as run
    from mstkd.compare.tables import print_comparison

    found = run(runs, out, baseline=baseline, primary=primary, published=published or (), shards=shards, seed=seed)
    print_comparison(found)
    typer.echo(f"report: {found.out / 'compare.html'}")
