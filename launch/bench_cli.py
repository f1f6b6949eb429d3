"""`mstkd bench ...`: measurements that a user can repeat."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mstkd.errors import UserError
from mstkd.launch.shards_cli import print_table

bench = typer.Typer(help="Measure this machine, beside the usual ways.")


@bench.callback()
def _group() -> None:
    """Keeps `data` a command of its own while it is the only one."""


@bench.command()
def data(
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write everything as JSON.")] = None,
    volumes: Annotated[int, typer.Option(min=3, help="How many subjects to generate.")] = 32,
    shape: Annotated[str, typer.Option(metavar="X,Y,Z", help="Voxels of each of a subject's four volumes.")] = "128,160,128",
    seconds: Annotated[float, typer.Option(help="Per contender, over all rounds.")] = 10.0,
    slow_mb_per_s: Annotated[float, typer.Option(help="Rate of the slow source.", min=0.1)] = 100.0,
    dir: Annotated[Path | None, typer.Option(help="Folder on the disk to measure. Default: the temporary folder.")] = None,
    peer_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment that has the peers.")] = None,
) -> None:
    """How fast volumes become tensors: raw reads, tarfile, WebDataset, MDS, litdata, NIfTI and mstkd, in turn, page cache warm.

    Example: mstkd bench data --json bench.json

    Example: mstkd bench data --peer-python peers/bin/python --dir /scratch
    """
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise UserError(f"--json {json}: not a file in a folder that exists; create the folder, or give another name")
    from mstkd.bench.data import Settings, bench_data

    settings = Settings(
        volumes=volumes, shape=_shape(shape), seconds=seconds, slow_mb_per_s=slow_mb_per_s, nifti_volumes=min(volumes, Settings.nifti_volumes)
    )
    report = bench_data(settings, dir, peer_python, _say)
    for table in report.tables():
        print_table(table)
    if json is not None:
        json.write_text(report.to_json())
        typer.echo(f"wrote {json}")


def _shape(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--shape {text}: give three whole numbers, e.g. 128,160,128") from None
    return x, y, z


def _say(line: str) -> None:
    typer.echo(line, err=True)
    sys.stderr.flush()
