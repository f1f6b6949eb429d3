"""`mstkd shards ...`: making and checking shard sets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

shards = typer.Typer(help="Make and check shard sets.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A shard set: a folder with tars and index.json.")]


@shards.command()
def phantom(
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    subjects: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    size: Annotated[int, typer.Option(help="Voxels per axis.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
    paired_7t: Annotated[bool, typer.Option("--paired-7t", help="The same heads at 3T and 7T, with tissue labels.")] = False,
) -> None:
    """Generate a cohort of physical brain phantoms as NIfTI, in BraTS 2018 layout.

    Example: mstkd shards phantom --out demo/nifti --subjects 20
    """
    from mstkd.shards.phantom import write_phantom

    written = write_phantom(out, subjects, size, seed, paired_7t)
    typer.echo(f"wrote {len(written)} subjects to {out}")


@shards.command()
def build(
    spec: Annotated[str, typer.Option(help="A packaged data set spec, or a path ending in .yaml.")],
    src: Annotated[Path, typer.Option(help="Folder of NIfTI files.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes; the files do not depend on it.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the default splits.")] = 0,
    splits: Annotated[Path | None, typer.Option(help="A splits.json to use instead of the default splits.")] = None,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Let a patient be on two sides of a split.")] = False,
) -> None:
    """Turn a folder of NIfTI cases into a shard set.

    Example: mstkd shards build --spec phantom --src demo/nifti --out demo/shards --workers 4
    """
    from mstkd.shards.build import build as run

    index = run(spec, src, out, workers=workers, seed=seed, splits=splits, allow_overlap=allow_overlap)
    typer.echo(f"wrote {len(index.subjects())} subjects in {len(index.shards)} tars to {out}")


@shards.command()
def verify(folder: Folder) -> None:
    """Read a shard set whole and compare it with its index.

    Example: mstkd shards verify demo/shards
    """
    from mstkd.shards.verify import verify as run

    run(folder)
    typer.echo(f"{folder}: sound")


@shards.command()
def inspect(
    folder: Folder,
    png: Annotated[Path | None, typer.Option(help="Also write a picture of the first subjects.")] = None,
) -> None:
    """Show what is in a shard set.

    Example: mstkd shards inspect demo/shards --png demo/shards.png
    """
    from mstkd.shards import inspection

    print_table(inspection.table(folder))
    if png is not None:
        inspection.montage(folder, png)
        typer.echo(f"wrote {png}")


def print_table(table: Table) -> None:
    """Print `table` as wide as the terminal; into a file or a pipe wide enough that nothing is cut off."""
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
