"""The `mstkd` command: reads the command line, calls one function, turns what goes wrong into one line.

Only light modules are imported here; each command imports what it needs, so that `--help` answers at once.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Column, Table

from mstkd.config import load_config
from mstkd.errors import CasesFailedError, TrainingError, UserError
from mstkd.launch.arguments import Overrides, RecipeName, parse_part
from mstkd.launch.bench_cli import bench
from mstkd.launch.compare_cli import compare
from mstkd.launch.mlflow_cli import mlflow
from mstkd.launch.plan_cli import plan
from mstkd.launch.printing import print_table
from mstkd.launch.report_cli import report
from mstkd.launch.shards_cli import shards
from mstkd.launch.status_cli import cancel, logs, status
from mstkd.launch.study_cli import study

UsageError = typer.BadParameter.__bases__[0]  # Typer re-exports only the subclass
INTERRUPTED = 130  # the shell's code for Ctrl-C

app = typer.Typer(
    help="Distil a teacher that sees every MR sequence into a student that works with any subset.",
    pretty_exceptions_enable=False,
)
app.add_typer(shards, name="shards")
app.add_typer(mlflow, name="mlflow")
app.add_typer(bench, name="bench")

Postprocess = Annotated[
    Literal["none", "cc+et", "cc+cluster+et"] | None, typer.Option(help="Clear up tumour label maps. Default: inference.postprocess of the run.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/mst_kdnet_phantom.")]


def main() -> None:
    """The console script. Bad input: one red line on stderr and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except (UserError, TrainingError, CasesFailedError) as error:
        _fail(str(error), error.exit_code)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "mstkd"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror}; check that the folder exists, is yours to write and has space")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
) -> None:
    """Train one recipe: one process, or as many as the launcher started.

    Example: mstkd train mst_kdnet_phantom train.steps=50
    """
    load_config(recipe, overrides or [])  # a wrong key is said at once, not after seconds of imports
    from mstkd.train import run

    raise typer.Exit(run(recipe, overrides or []))


@app.command()
def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option(help="A cluster by name, or a YAML file.")] = ...,
    nodes: Annotated[int | None, typer.Option(help="Instead of the cluster file's.", min=1)] = None,
    stages: Annotated[str | None, typer.Option(help="One job per stage, each after the one before: A,B or all. Default: one job.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=V1,V2", help="One run per combination, as a job array.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what sbatch would get, and write nothing.")] = False,
) -> None:
    """Submit a recipe to SLURM, with an evaluation as the last job.

    Example: mstkd submit mst_kdnet_brats2024 --cluster gpu --nodes 4 train.global_batch=16 data.shards=/data/brats2024

    Example: mstkd submit mst_kdnet_phantom --cluster devcluster --sweep method.tau=4,7,10 seed=0,1,2
    """
    from mstkd.launch import submit as submission
    from mstkd.launch.cluster import load_cluster

    resources = load_cluster(cluster, {"nodes": nodes} if nodes else None)
    prepared = submission.prepare(recipe, cluster, resources, stages, overrides or [], sweep or [])
    if dry_run:
        typer.echo(submission.dry_run(prepared))
        return
    for job in submission.submit(prepared):
        waits = f", after {job.after}" if job.after else ""
        typer.echo(f"submitted {job.id}: {job.kind} {' '.join(job.stages)}{waits}")
    typer.echo(f"follow with: mstkd status {prepared.name}; mstkd logs {prepared.name} --follow")


for command in (plan, status, logs, cancel, study):
    app.command()(command)


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run folder.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys of how it predicts: inference.*, evaluate.*, a sampler's.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another shard set than the run's own.")] = None,
    split: Annotated[str, typer.Option(help="Which subjects of it: test, val, train or all.")] = "test",
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Score cases that training saw; the report says so.")] = False,
    postprocess: Postprocess = None,
    complete: Annotated[Path | None, typer.Option(metavar="RUN", help="A synthesis run: the networks see every sequence, completed by it.")] = None,
    pred: Annotated[Path | None, typer.Option(help="Instead of RUN: a folder of predicted label maps.")] = None,
    ref: Annotated[Path | None, typer.Option(help="With --pred: the folder of reference label maps.")] = None,
    spec: Annotated[str | None, typer.Option(help="With --pred: the data set spec that names files and labels.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --pred: where results go. Default: PRED/evaluation.")] = None,
) -> None:
    """Score a run, or label maps that lie in a folder, on every subset of sequences. What was interrupted goes on where it stopped.

    Example: mstkd evaluate runs/mst_kdnet_phantom

    Example: mstkd evaluate runs/m2dn_phantom method.sampler.samples=8

    Example: mstkd evaluate --pred predictions --ref labels --spec brats2018
    """
    if (run is None) == (pred is None):
        raise UserError("mstkd evaluate: give either RUN or --pred DIR --ref DIR --spec NAME")
    if run is not None:
        from mstkd.evaluate.run import evaluate_on_ranks

        evaluate_on_ranks(run, data, split, allow_overlap, postprocess, complete, overrides or [])
    else:
        if ref is None or spec is None:
            raise UserError("mstkd evaluate --pred: --ref DIR and --spec NAME are needed too")
        if postprocess or complete:
            option = "--postprocess" if postprocess else "--complete"
            raise UserError(f"mstkd evaluate --pred: label maps are scored as they are; give {option} to mstkd predict")
        from mstkd.evaluate.label_files import evaluate_predictions

        evaluate_predictions(pred, ref, spec, out or pred / "evaluation")


@app.command()
def predict(
    runs: Annotated[list[str], typer.Argument(metavar="RUN... [KEY=VALUE...]", help="A run folder, several (folds, seeds) as an ensemble; recipe keys of how it predicts: inference.*, a sampler's.")],
    input: Annotated[Path, typer.Option(help="Folder of NIfTI cases with any subset of the sequences, or a list, .csv or .json. Synthesis: or a shard set.")],
    output: Annotated[Path, typer.Option(help="Folder to create, or to go on in.")],
    spec: Annotated[str | None, typer.Option(help="How files are named. Default: as in the run's data set.")] = None,
    postprocess: Postprocess = None,
    given: Annotated[str | None, typer.Option(help="Synthesis: show the network these sequences, e.g. flair, or per case one drawn: drawn, any subset drawn: uniform.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --given drawn and uniform.")] = 0,
    complete: Annotated[Path | None, typer.Option(metavar="RUN", help="Segmentation: complete each case by this synthesis run first.")] = None,
    splits: Annotated[Path | None, typer.Option(help="Synthesis, shard sets: who is trained, validated and tested on in the completed set.")] = None,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Only the I-th of N parts of the cases; parts share the output folder.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write each region's probability.")] = False,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write the predictive entropy, 0 to 1 bit.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also draw each case with the regions' outlines, a PNG.")] = False,
) -> None:
    """Predict label maps for NIfTI cases, on their original grid; with a synthesis run the sequences that cases lack.

    The same command again goes on where it was interrupted. Exit code 1 if some cases could not be predicted, see predictions.json.

    Example: mstkd predict runs/mst_kdnet_phantom --input cases --output predictions

    Example: mstkd predict runs/fold0 runs/fold1 inference.mirror=true --input cases.csv --output predictions --part 2/8 --overlay

    Example: mstkd predict runs/utad_net_phantom --input demo/shards --output demo/completed --given drawn
    """
    from mstkd.methods import load
    from mstkd.run_folder import read_run_config

    folders = [word for word in runs if "=" not in word or Path(word).is_dir()]  # a folder's name may hold a =
    overrides = [word for word in runs if word not in folders]
    if not folders:
        raise UserError("mstkd predict: no RUN given, only recipe keys")
    label_options = {"postprocess": postprocess, "complete": complete, "part": part, "probabilities": probabilities, "uncertainty": uncertainty, "overlay": overlay}
    if load(read_run_config(Path(folders[0]), overrides).method["name"]).task == "synthesis":
        if asked := [name for name, value in label_options.items() if value]:
            raise UserError(f"--{asked[0]}: is for label maps; a synthesis run makes images")
        if len(folders) > 1:
            raise UserError(f"{folders[1]}: only segmentations form ensembles; give one synthesis run")
        from mstkd.complete import complete as write_completed

        typer.echo(f"wrote {write_completed(Path(folders[0]), input, output, spec, given, seed, splits, overrides)} to {output}")
        return
    if given or splits:
        raise UserError(f"--{'given' if given else 'splits'}: is for synthesis runs; a segmentation uses every sequence that a case has")
    chosen = parse_part(part)
    from mstkd.predict import Beside, predict_folder

    beside = Beside(probabilities, uncertainty, overlay)
    written = predict_folder([Path(run) for run in folders], input, output, spec, postprocess, complete, overrides=overrides, beside=beside, part=chosen)
    typer.echo(f"wrote {len(written)} label maps to {output}")


for command in (compare, report):
    app.command()(command)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    format: Annotated[Literal["safetensors", "onnx", "monai-bundle", "mlflow"], typer.Option(help="What to write.")] = "safetensors",
    checkpoint: Annotated[str, typer.Option(help="best, latest, or one that the run keeps, e.g. step-00000120.")] = "best",
    spec: Annotated[str | None, typer.Option(help="How cases are named and prepared. Default: as in the run's data set.")] = None,
) -> None:
    """Write the student for use elsewhere, without anything that identifies a person or a machine. Needs no GPU.

    safetensors: for Python, mstkd.load("student").predict(...). onnx: two graphs, seen to compute alike in ONNX Runtime.
    monai-bundle: does without mstkd. mlflow: for mlflow models serve.

    Example: mstkd export runs/mst_kdnet_phantom --format onnx --out student

    Example: mstkd export runs/mst_kdnet_phantom --checkpoint step-00000120 --out student
    """
    from mstkd.export import export as write

    write(run, out, format, checkpoint, spec)
    typer.echo(f"wrote {out}")


@app.command()
def methods() -> None:
    """List the methods that a recipe can name. Parameters: with default settings for four sequences (where they depend on
    the crop, 160 x 192 x 128, or slices of 128 x 128; digits in two views), of all networks and of the one that evaluation reports first.

    Example: mstkd methods
    """
    from mstkd.method_list import entries

    listed = entries()
    parameters = Column("parameters\n(reported)", justify="right", no_wrap=True)
    name, stages = (Column(title, no_wrap=True) for title in ("method", "stages"))
    table = Table(name, "task", stages, Column("paper", max_width=16), parameters, "what is reproduced")
    for entry in listed:
        table.add_row(entry.name, entry.task, "\n".join(entry.stages), entry.paper, entry.millions.replace(" (", "\n("), entry.reproduces)
    print_table(table)
    for entry in listed:
        if entry.problem:
            typer.echo(f"{entry.name}: not counted, {entry.problem}")


@app.command()
def doctor(
    cluster: Annotated[str | None, typer.Option(help="Also check what this cluster, by name or YAML file, needs of SLURM.")] = None,
    nodes: Annotated[int | None, typer.Option(help="With --cluster: also run a check on so many nodes.", min=1)] = None,
    runs_dir: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs"),
    fix: Annotated[bool, typer.Option("--fix", help="Close the MLflow runs that a hard kill left RUNNING.")] = False,
) -> None:
    """Check that this machine and its cluster can train; each finding is one line with its fix. Exit code 1 if one says FAIL.

    Example: mstkd doctor

    Example: mstkd doctor --cluster gpu --nodes 2 --runs-dir runs
    """
    from mstkd.launch.doctor import findings

    failed = False
    for finding in findings(runs_dir, cluster, nodes, fix):
        typer.echo(str(finding))
        sys.stdout.flush()
        failed |= finding.state == "FAIL"
    if failed:
        raise typer.Exit(1)


def _fail(message: str, exit_code: int = 2) -> None:
    red = None if os.environ.get("NO_COLOR") else typer.colors.RED
    typer.secho(f"error: {message}", fg=red, err=True)
    sys.exit(exit_code)
