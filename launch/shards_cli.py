"""`mstkd shards ...`: making and checking shard sets."""

from pathlib import Path
from typing import Annotated

import typer

from mstkd.errors import UserError
from mstkd.launch.arguments import parse_part
from mstkd.launch.printing import print_table

shards = typer.Typer(help="Make and check shard sets.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A shard set: a folder with tars and index.json.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on it.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the default splits.")]


@shards.command()
def phantom(
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    subjects: Annotated[int | None, typer.Option(min=1, help="How many. Default: 20, with --digits 1500.")] = None,
    size: Annotated[int, typer.Option(help="Voxels per axis.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
    paired_7t: Annotated[bool, typer.Option("--paired-7t", help="The same heads at 3T and 7T, with tissue labels.")] = False,
    digits: Annotated[bool, typer.Option("--digits", help="Instead: written and spoken digits as PNG and WAV, for classification.")] = False,
) -> None:
    """Generate a cohort of physical brain phantoms as NIfTI, in BraTS 2018 layout.

    Example: mstkd shards phantom --out demo/nifti --subjects 20

    Example: mstkd shards phantom --digits --out demo/digits
    """
    if digits:
        if paired_7t or size != 64:
            raise UserError("--digits: has no brains; leave out --paired-7t and --size")
        from mstkd.shards.digits import write_digits

        written = write_digits(out, subjects or 1500, seed)
    else:
        from mstkd.shards.phantom import write_phantom

        written = write_phantom(out, subjects or 20, size, seed, paired_7t)
    typer.echo(f"wrote {len(written)} subjects to {out}")


@shards.command()
def prepare(
    config: Annotated[Path, typer.Option(help="A YAML file: the commands to run, in order.")],
    src: Annotated[Path, typer.Option(help="Folder of raw scans.")],
    out: Annotated[Path, typer.Option(help="Folder for the results and logs.")],
    workers: Annotated[int, typer.Option(min=1, help="Subjects at work at once.")] = 1,
) -> None:
    """Run external tools on raw scans (DICOM conversion, registration, skull-stripping) and check each result.

    Run again, it leaves finished steps alone.

    Example: mstkd shards prepare --config prepare.yaml --src raw --out nifti --workers 4
    """
    from mstkd.shards.prepare import prepare as run

    subjects = run(config, src, out, workers)
    typer.echo(f"prepared {len(subjects)} subjects into {out}")


@shards.command()
def build(
    spec: Annotated[str, typer.Option(help="A packaged data set spec, or a path ending in .yaml.")],
    src: Annotated[Path, typer.Option(help="Folder of NIfTI files.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    workers: Workers = 1,
    seed: Seed = 0,
    splits: Annotated[Path | None, typer.Option(help="Who goes where: a splits.json, nnU-Net's splits_final.json, a MONAI datalist, or published (ibsr18, malc2012).")] = None,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Let a patient be on two sides of a split.")] = False,
    subjects_per_shard: Annotated[int, typer.Option(min=1, help="Subjects in a tar.")] = 8,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Build the I-th of N parts; then: mstkd shards merge OUT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted build, or begin.")] = False,
    pseudonymise: Annotated[bool, typer.Option("--pseudonymise", help="Replace subject and patient keys by keyed hashes.")] = False,
    salt_file: Annotated[Path | None, typer.Option(help="With --pseudonymise: the secret. Default: one beside OUT, made if absent.")] = None,
) -> None:
    """Turn a folder of NIfTI cases into a shard set.

    Example: mstkd shards build --spec phantom --src demo/nifti --out demo/shards --workers 4

    Example: mstkd shards build --spec brats2021 --src raw --out shards/brats2021 --workers 8 --part 3/20 --resume
    """
    from mstkd.shards.build import build as run

    index = run(
        spec, src, out, workers=workers, seed=seed, splits=splits, allow_overlap=allow_overlap, subjects_per_shard=subjects_per_shard,
        part=parse_part(part), resume=resume, pseudonymise=pseudonymise, salt_file=salt_file,
    )  # fmt: skip
    if index is not None:
        typer.echo(f"wrote {len(index.subjects())} subjects in {len(index.shards)} tars to {out}")


@shards.command()
def views(
    src: Annotated[Path, typer.Option(help="Folder with two or more of images/<class>/<id>.png, audio/<class>/<id>.wav, embeddings.csv.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    name: Annotated[str, typer.Option(help="Of the data set; begins the tars' names.")] = "views",
    seconds: Annotated[float, typer.Option(min=0.05, help="Recordings are cut or padded to this length.")] = 1.0,
    seed: Seed = 0,
    splits: Annotated[Path | None, typer.Option(help="Who goes where: a splits.json.")] = None,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Let a patient be on two sides of a split.")] = False,
    subjects_per_shard: Annotated[int, typer.Option(min=1, help="Subjects in a tar.")] = 100,
) -> None:
    """Turn images, recordings and vectors, by class, into a shard set for classification. patients.csv (id,patient) is optional.

    Example: mstkd shards views --src demo/digits --out demo/digit-shards --name digits
    """
    from mstkd.shards.views import build_views

    index = build_views(
        src, out, name=name, seconds=seconds, seed=seed, splits=splits, allow_overlap=allow_overlap, subjects_per_shard=subjects_per_shard
    )
    classes, seen = index.classification.classes, " and ".join(index.sequences)
    typer.echo(f"wrote {len(index.subjects())} subjects of {len(classes)} classes, {seen}, in {len(index.shards)} tars to {out}")


@shards.command()
def merge(out: Annotated[Path, typer.Argument(metavar="OUT", help="What the parts were given as --out.")]) -> None:
    """Make a shard set of the parts that `build --part` has built.

    Example: mstkd shards merge shards/brats2021
    """
    from mstkd.shards.parts import merge as run

    index, text = run(out)
    typer.echo(text, err=True)
    typer.echo(f"wrote {len(index.subjects())} subjects in {len(index.shards)} tars to {out}")


@shards.command()
def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of WebDataset tars without index.json.")],
    spec: Annotated[str | None, typer.Option(help="The data set spec that gives sequences and label scheme.")] = None,
    workers: Workers = 1,
    seed: Seed = 0,
    splits: Annotated[Path | None, typer.Option(help="Who goes where: as for build.")] = None,
) -> None:
    """Make a shard set of WebDataset tars that another program wrote, after checking every member.

    Example: mstkd shards index converted/tars --spec brats2021 --workers 4
    """
    from mstkd.shards.foreign import index_foreign

    found = index_foreign(folder, spec, workers=workers, seed=seed, splits=splits)
    typer.echo(f"indexed {len(found.subjects())} subjects in {len(found.shards)} tars of {folder}")


@shards.command()
def verify(folder: Folder, workers: Workers = 1) -> None:
    """Read a shard set whole and compare it with its index.

    Example: mstkd shards verify demo/shards --workers 4
    """
    from mstkd.shards.verify import verify as run

    run(folder, workers)
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

    if png is not None and png.suffix != ".png":
        raise UserError(f"--png {png}: give a name that ends in .png")
    print_table(inspection.table(folder))
    if png is not None:
        inspection.montage(folder, png)
        typer.echo(f"wrote {png}")


@shards.command()
def nnunet(folder: Folder, out: Annotated[Path, typer.Option(help="Folder to create, by custom DatasetXXX_Name.")]) -> None:
    """Write a shard set as nnU-Net's raw data folder. nnU-Net's predictions: mstkd evaluate --pred DIR --ref OUT/labelsTs --spec nnunet.

    Example: mstkd shards nnunet shards/completed --out nnUNet_raw/Dataset501_Completed
    """
    from mstkd.shards.nnunet_export import export_nnunet

    counts = export_nnunet(folder, out)
    typer.echo(f"wrote {counts['Tr']} cases for training and {counts['Ts']} for testing to {out}")


@shards.command()
def splits(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="File to write, for build or predict --splits, or in place of the set's splits.json.")],
    train: Annotated[int | None, typer.Option(min=1, help="Subjects to train on.")] = None,
    val: Annotated[int | None, typer.Option(min=1, help="Subjects to validate on.")] = None,
    test: Annotated[int | None, typer.Option(min=0, help="Subjects to test on.")] = None,
    leave_one_out: Annotated[bool, typer.Option("--leave-one-out", help="One fold per patient, who is tested on in it; instead of the three numbers.")] = False,
    within: Annotated[str | None, typer.Option(help="Only subjects that the set's own splits have there, e.g. val,test.")] = None,
    seed: Seed = 0,
) -> None:
    """Draw splits of given sizes, or folds that leave one out, by patient.

    Example: mstkd shards splits shards/brats2020 --train 180 --val 30 --test 159 --out translation.json

    Example: mstkd shards splits shards/pairs --leave-one-out --out shards/pairs/splits.json

    Example: mstkd shards splits shards/brats2020 --within val,test --train 100 --val 20 --test 69 --out downstream.json
    """
    from mstkd.shards import splits as drawing
    from mstkd.shards.layout import SPLITS, write_model

    if out.exists() and out.resolve() != (folder / SPLITS).resolve():
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    counts = (train, val, test)
    if leave_one_out and (within or any(count is not None for count in counts)):
        raise UserError("--leave-one-out: takes all patients; leave out --train, --val, --test and --within")
    if leave_one_out:
        found = drawing.leave_one_out(folder, seed)
        said = f"{len(found.folds)} folds, each with one patient to test on and another to validate on"
    elif None in counts:
        raise UserError("--train, --val, --test: give all three, or --leave-one-out")
    else:
        found, said = drawing.counted_splits(folder, *counts, tuple(within.split(",")) if within else (), seed), f"{train} train, {val} val, {test} test"
    write_model(out, found)
    typer.echo(f"wrote {out}: {said}")
