"""`mstkd bench ...`: measurements that a user can repeat."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mstkd.errors import UserError
from mstkd.launch.arguments import writable_file
from mstkd.launch.printing import print_table

JsonFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write everything as JSON.", callback=writable_file)]
TrainedRun = Annotated[Path | None, typer.Option(metavar="RUN", help="A trained segmentation, on its test split, instead of generated cases.")]
CaseSize = Annotated[int, typer.Option(min=32, max=256, help="Voxels per axis of generated cases.")]

bench = typer.Typer(help="Measure this machine, beside the usual ways.")


@bench.command()
def data(
    json: JsonFile = None,
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
    from mstkd.bench.data import Settings, bench_data

    settings = Settings(
        volumes=volumes, shape=_shape(shape), seconds=seconds, slow_mb_per_s=slow_mb_per_s, nifti_volumes=min(volumes, Settings.nifti_volumes)
    )
    report = bench_data(settings, dir, peer_python, _say)
    _show(report, json)


@bench.command()
def step(
    json: JsonFile = None,
    crop: Annotated[str, typer.Option(metavar="X,Y,Z", help="Voxels of the crop.")] = "96,96,96",
    full: Annotated[bool, typer.Option("--full", help="The published crop, 160,192,128.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender has its turn.")] = 3,
) -> None:
    """A training step of MST-KDNet beside the same step in plain PyTorch: time, peak memory, FLOP/s, and equal losses.

    Needs 14 GiB of memory at 96,96,96, where a turn of a contender takes about a minute on two CPU cores.

    Example: mstkd bench step --json step.json
    """
    from mstkd.bench.step import PUBLISHED_CROP, Settings, bench_step

    _show(bench_step(Settings(crop=PUBLISHED_CROP if full else _shape(crop, "--crop"), rounds=rounds), _say), json)


@bench.command()
def cost(
    recipe: Annotated[list[str], typer.Option(help="A recipe; give several to compare them, ratios are to the first.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted recipe keys to change in all of them.")] = None,
    json: JsonFile = None,
    given: Annotated[str, typer.Option(metavar="SUBSET", help="The sequences that the student sees.")] = "flair+t1+t1ce+t2",
    iterations: Annotated[int, typer.Option(min=1, help="Timed ones, of training and of test.")] = 30,
) -> None:
    """What recipes cost: time of a training and of a test iteration, peak memory, parameters. Random data, batch 1, one rank.

    Example: mstkd bench cost --recipe shaspec_brats2018 --recipe mst_kdnet_brats2024 --json cost.json

    Example: mstkd bench cost --recipe shaspec_phantom --recipe mst_kdnet_phantom --given flair data.crop=[64,64,32]
    """
    from mstkd.bench.cost import bench_cost
    from mstkd.config import load_config

    for name in recipe:
        load_config(name, overrides or [])  # a wrong key is said at once
    _show(bench_cost(recipe, overrides or [], given, iterations, _say), json)


@bench.command()
def evaluate(
    json: JsonFile = None,
    run: TrainedRun = None,
    cases: Annotated[int, typer.Option(min=1, help="How many cases.")] = 2,
    size: CaseSize = 96,
    full: Annotated[bool, typer.Option("--full", help="Generated cases of 176 voxels per axis, of 1 mm.")] = False,
) -> None:
    """Scoring every subset of sequences, beside the straightforward loop: one pass per subset, MONAI's metrics on whole volumes.

    Both apply the same network in the same windows, and their figures must be equal. Without --run an untrained small MST-KDNet is run, and
    tumours come from a linear read-out. Minutes on two CPU cores, hours with --full.

    Example: mstkd bench evaluate --json evaluate.json

    Example: mstkd bench evaluate --run runs/mst_kdnet_phantom --cases 4
    """
    from mstkd.bench.evaluation import FULL_SIZE, Settings, bench_evaluate

    _show(bench_evaluate(Settings(cases=cases, size=FULL_SIZE if full else size, run=run), _say), json)


@bench.command()
def predict(
    json: JsonFile = None,
    run: TrainedRun = None,
    cases: Annotated[int, typer.Option(min=1, help="How many cases; the contenders take turns on each.")] = 3,
    size: CaseSize = 96,
) -> None:
    """Inference of whole cases beside MONAI's SlidingWindowInferer: the same network, window, overlap and Gaussian weights; time and peak memory.

    MONAI has two goes: at the file's whole grid, as is usual, and at the box around the brain, which is all that mstkd looks at; there
    logits must be equal to 1e-5. From a normalised image to a label map, all sequences given.

    Example: mstkd bench predict --json predict.json

    Example: mstkd bench predict --run runs/mst_kdnet_phantom --cases 5
    """
    from mstkd.bench.evaluation import Settings
    from mstkd.bench.prediction import bench_predict

    _show(bench_predict(Settings(cases=cases, size=size, run=run), _say), json)


def _show(report, json: Path | None) -> None:
    for table in report.tables():
        print_table(table)
    if json is not None:
        json.write_text(report.to_json())
        typer.echo(f"wrote {json}")


def _shape(text: str, option: str = "--shape") -> tuple[int, int, int]:
    try:
        x, y, z = (int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}: give three whole numbers, e.g. 128,160,128") from None
    return x, y, z


def _say(line: str) -> None:
    typer.echo(line, err=True)
    sys.stderr.flush()
