"""`mstkd submit`: a recipe, a chain of its stages or a sweep, as SLURM jobs through submitit."""

import itertools
import json
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mstkd.config import RunConfig, load_config
from mstkd.errors import UserError
from mstkd.files import write_json
from mstkd.launch.batch import sbatch_parameters
from mstkd.launch.cluster import Cluster, packaged_slurm
from mstkd.launch.jobs import SubmittedJob, note_jobs
from mstkd.launch.queue import look_up
from mstkd.launch.snapshot import take_snapshot
from mstkd.launch.status import read_run
from mstkd.launch.verdict import Task, write_tasks
from mstkd.recipe import parse_override


@dataclass(frozen=True)
class Link:
    """One job of the chain: an array if there are several runs."""

    kind: str  # train, evaluate
    stages: tuple[str, ...]
    cluster: Cluster

    @property
    def label(self) -> str:
        return "-".join(("evaluate",) if self.kind == "evaluate" else self.stages)


@dataclass(frozen=True)
class Submission:
    """What is to be submitted; everything about it has been checked, nothing has been written."""

    name: str  # of the run, or of the sweep
    cluster_name: str
    runs: list[RunConfig]
    axes: dict[str, list]  # of the sweep, {} for a single run
    links: list[Link]

    @property
    def folder(self) -> Path:
        """The run's folder, or the sweep's beside its members'."""
        return (Path(self.runs[0].runs_dir) / self.name).resolve()


def prepare(recipe: str, cluster_name: str, cluster: Cluster, stages: str | None, words: list[str], sweep: list[str]) -> Submission:
    """Read and check everything. `stages`: a comma list or "all", one job each; None: one job for all of them."""
    axes, overrides = sweep_axes(sweep, words)
    base = load_config(recipe, overrides)
    runs = [_checked(load_config(recipe, [*overrides, *changes]), cluster) for changes in _members(base.name, axes)]
    links = [Link("train", group, cluster) for group in _groups(runs[0], stages)]
    one = {"gpus_per_node": 1} if cluster.gpus_per_node else {"ranks_per_node": 1}
    links.append(Link("evaluate", (), cluster.model_copy(update={"nodes": 1, **one})))
    if len({run.name for run in runs}) < len(runs):
        raise UserError("--sweep: two members have the same name; give values that differ in letters or digits")
    return Submission(base.name, cluster_name, runs, axes, links)


def dry_run(submission: Submission) -> str:
    """The exact text that sbatch would get for each job; ids of earlier jobs are not known yet."""
    texts, before = [], None
    for number, link in enumerate(submission.links, 1):
        folder = submission.folder / "jobs" / f"{number}-{link.label}"
        executor = _executor(submission, link, folder, before, probe=True)
        texts.append(f"# job {number}: {link.label}\n" + executor._make_submission_file_text(executor._submitit_command_str, ""))
        before = f"<job {number}>"
    return "\n".join(texts)


def submit(submission: Submission) -> list[SubmittedJob]:
    """Write the run folders, then submit every job of the chain. Raises UserError with SLURM's own message."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not on PATH: submit from a login node of the cluster, try a cluster on this machine with "
            f"{packaged_slurm() / 'devcluster' / 'up'}, or train here with: deepspeed --num_gpus N --module mstkd.train RECIPE"
        )
    _refuse_live_runs(submission)
    _write_runs(submission)
    submitted: list[SubmittedJob] = []
    before = None
    for number, link in enumerate(submission.links, 1):
        before = _submit_link(submission, number, link, before, submitted)
    return submitted


def sweep_axes(sweep: list[str], words: list[str]) -> tuple[dict[str, list], list[str]]:
    """({key: values}, the other words): with --sweep, every word with a bare comma list is an axis."""
    axes, overrides = {}, []
    for word in [*sweep, *(words if sweep else [])]:
        key, equals, text = word.partition("=")
        if equals and "," in text and text.lstrip()[:1] not in "[{\"'":
            axes[key.strip()] = [parse_override(f"{key}={value}")[1] for value in text.split(",")]
        elif word in sweep:
            raise UserError(f"--sweep {word}: write it as key=value,value,...")
        else:
            overrides.append(word)
    return axes, overrides if sweep else words


def _members(name: str, axes: dict[str, list]) -> list[list[str]]:
    """The overrides of each member of the sweep: one of each axis, and its own name."""
    members = []
    for values in itertools.product(*axes.values()):
        chosen = list(zip(axes, values, strict=True))
        suffix = "".join(f"-{key.rpartition('.')[2]}{re.sub(r'[^A-Za-z0-9.]+', '_', str(value))}" for key, value in chosen)
        members.append([*(f"{key}={json.dumps(value)}" for key, value in chosen), f"name={name}{suffix}"])
    return members


def _checked(config: RunConfig, cluster: Cluster) -> RunConfig:
    from mstkd import methods  # torch

    config.train.accumulation(cluster.world)
    methods.check_input(config.method, config.data)
    return config.model_copy(update={"method": methods.resolve(config.method, config.origin), "stages": methods.stage_names(config.method, config.stages)})


def _method(config: RunConfig):
    from mstkd import methods

    return methods.load(config.method["name"])


def _groups(config: RunConfig, stages: str | None) -> list[tuple[str, ...]]:
    """The stages of each train job."""
    method = _method(config)
    known = method.stages
    wanted = tuple(config.stages or known)
    if stages is None:
        return [wanted]
    chosen = wanted if stages == "all" else tuple(method.aliases.get(stage, stage) for stage in stages.split(","))
    if unknown := [stage for stage in chosen if stage not in known]:
        raise UserError(f"--stages {stages}: {unknown[0]!r} is no stage of {config.method['name']}; its stages: {', '.join(known)}, or all")
    return [(stage,) for stage in known if stage in chosen]


def _refuse_live_runs(submission: Submission) -> None:
    """Two jobs must not train one run, and the code of a queued one must not change."""
    known = {job: run.run_dir for run in submission.runs for job in read_run(run.run_dir).ids}
    queue = look_up(known)
    if known and not queue.answered:
        raise UserError(f"{queue.note}: whether an earlier job of this run is live cannot be asked; submit again when SLURM answers")
    if live := queue.live(known):
        run_dir = known[live[0].id]
        raise UserError(f"{run_dir}: its job {live[0].id} is {live[0].state.lower()} already; wait for it, or first: mstkd cancel {run_dir.name}")


def _write_runs(submission: Submission) -> None:
    from mstkd.run_folder import begin_run
    from mstkd.track.mlflow_tracker import prepare_database

    if submission.axes:
        _write_sweep(submission)
    first = None
    for run in submission.runs:
        begin_run(run)
        code = run.run_dir / "code"
        if first is None:
            take_snapshot(code)
            first = code
        else:
            shutil.rmtree(code, ignore_errors=True)
            shutil.copytree(first, code)
        if run.tracking.uri is None:
            prepare_database(run.run_dir)


def _write_sweep(submission: Submission) -> None:
    """<runs_dir>/<sweep>/sweep.json, in one move: members may read it at any time."""
    from mstkd.track.mlflow_tracker import create_sweep_parent

    submission.folder.mkdir(parents=True, exist_ok=True)
    path = submission.folder / "sweep.json"
    sweep = {"axes": submission.axes, "runs": [run.name for run in submission.runs], "id": _sweep_id(path)}
    if submission.runs[0].tracking.uri:
        sweep["mlflow_parent"] = create_sweep_parent(submission.runs[0], submission.name, submission.folder)
    write_json(path, sweep)


def _sweep_id(path: Path) -> str:
    """What tells the sweep from others of its name, on a tracking server that several people use: kept as long as its folder is there."""
    try:
        return json.loads(path.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return secrets.token_hex(8)


def _submit_link(submission: Submission, number: int, link: Link, before: str | None, submitted: list[SubmittedJob]) -> str:
    """Submit one job or array; returns its id."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = submission.folder / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}-{link.label}"
    folder.mkdir(parents=True)
    folders = [run.run_dir.resolve() for run in submission.runs]
    tasks = [Task(str(run.run_dir.resolve()), link.kind, link.cluster.requeues, run.watchdog.heartbeat_s) for run in submission.runs]
    write_tasks(folder, tasks)
    (folder / "runs.txt").write_text("".join(f"{path}\n" for path in folders))
    executor = _executor(submission, link, folder, before)
    try:
        with executor.batch():
            jobs = [executor.submit(_call(path, link)) for path in folders]
    except (FailedJobError, FailedSubmissionError) as error:
        earlier = f"; submitted before it: {', '.join(job.id for job in submitted)}" if submitted else ""
        raise UserError(f"cluster {submission.cluster_name}: sbatch refused the {link.label} job: {_slurm_message(error)}{earlier}") from None
    noted = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    for run, job in zip(submission.runs, jobs, strict=True):
        relative = str(folder.relative_to(submission.folder.parent))
        after = before if before is None or len(jobs) == 1 else f"{before}_{job.job_id.rpartition('_')[2]}"
        entry = SubmittedJob(
            id=job.job_id, kind=link.kind, stages=list(link.stages), cluster=submission.cluster_name, submitted=noted, after=after, folder=relative
        )
        note_jobs(run.run_dir, [entry])
        submitted.append(entry)
    return jobs[0].job_id.partition("_")[0]


def _call(run_dir: Path, link: Link):
    from mstkd.launch.job import Job

    return Job(str(run_dir), str(run_dir / "code"), link.kind, link.stages)


def _executor(submission: Submission, link: Link, folder: Path, before: str | None, probe: bool = False):
    """submitit's executor for one job of the chain; with `probe` also where SLURM is not installed."""
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2 if probe else super().affinity()

    dependency = None
    if before is not None:  # each member of an array waits for its own predecessor
        dependency = f"{'aftercorr' if len(submission.runs) > 1 else 'afterok'}:{before}"
    executor = Executor(folder=folder, max_num_timeout=link.cluster.requeues, python=link.cluster.python_command)
    executor.update_parameters(**sbatch_parameters(link.cluster, f"{submission.name}-{link.label}", folder, dependency))
    if len(submission.runs) > 1 and probe:
        executor.parameters["map_count"] = len(submission.runs)
    return executor


def _slurm_message(error: Exception) -> str:
    """What sbatch itself said."""
    lines = re.findall(r"sbatch: error: (.*)", str(error))
    return "; ".join(dict.fromkeys(lines)) or str(error).strip().splitlines()[-1]
