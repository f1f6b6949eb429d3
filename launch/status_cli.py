"""`mstkd status`, `mstkd logs` and `mstkd cancel`."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from mstkd.errors import UserError
from mstkd.launch.jobs import SubmittedJob
from mstkd.launch.printing import print_table
from mstkd.launch.queue import Queue, SlurmJob, look_up, scancel
from mstkd.launch.selection import Member, Target, find, ranked, runs_below
from mstkd.launch.status import RunFiles, RunStatus, duration, read_run, statuses, waits_for

POLL_S = 0.5  # between looks at a log
ASK_S = 5.0  # between questions to SLURM's controller
COLOURS = {
    "running": "green", "finished": "bold green", "pending": "yellow", "requeued": "yellow", "interrupted": "yellow", "stopped": "yellow",
    "failed": "red", "hung": "red", "dead": "red",
}  # fmt: skip

RunsDir = Annotated[Path, typer.Option(help="The folder of the runs.")]
RunOrJob = Annotated[str, typer.Argument(metavar="RUN_OR_JOB", help="A run's folder or name, a sweep's name, or a job's id.")]


def status(
    words: Annotated[list[str] | None, typer.Argument(metavar="RUN_OR_JOB", help="Runs, sweeps or job ids. Default: all runs.")] = None,
    runs_dir: RunsDir = Path("runs"),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a list of runs as JSON instead; - for stdout.")] = None,
) -> None:
    """Show what runs are doing: state, jobs, progress, attempts, last sign of life.

    Example: mstkd status

    Example: mstkd status --json - | jq -r '.[] | select(.state == "failed") | .reason'

    Example: mstkd status mst_kdnet_phantom 4711 --runs-dir runs
    """
    targets = [find(word, runs_dir) for word in words or ()]
    run_dirs = [run_dir for target in targets if target.sweep is None for run_dir in target.run_dirs]
    run_dirs = list(dict.fromkeys(run_dirs)) if targets else sorted(runs_below(runs_dir), key=_last_change)
    members = {target.word: ranked(target.sweep) for target in targets if target.sweep}
    everything = list(dict.fromkeys([*run_dirs, *(member.run_dir for ranking in members.values() for member in ranking)]))
    found, note = statuses(everything)
    if json is not None:
        _write_json(found, json)
        return
    if not everything:
        typer.echo(f"no runs in {runs_dir}")
        return
    by_run = dict(zip(everything, found, strict=True))
    if run_dirs:
        _print_runs([by_run[run_dir] for run_dir in run_dirs])
    for target in targets:
        if target.sweep:
            _print_sweep(target.sweep.axes, members[target.word], by_run)
    if note:
        typer.echo(f"{note}; this is what the run folders say", err=True)


def logs(
    run_or_job: RunOrJob,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what is added, until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    err: Annotated[bool, typer.Option("--err", help="What a job wrote to stderr instead of stdout.")] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Print what a rank of the newest job has written, or of the named job; all its attempts.

    Example: mstkd logs mst_kdnet_phantom --follow
    """
    target = find(run_or_job, runs_dir)
    if target.sweep or len(target.run_dirs) != 1:
        names = [run_dir.name for run_dir in target.run_dirs]
        raise UserError(f"{run_or_job}: {len(names)} runs; name one of them: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
    files = read_run(target.run_dirs[0])
    jobs = [job for job in files.jobs if target.covers(job.id)] if target.job else files.chain
    sys.stdout.flush()
    try:
        if jobs:
            _job_logs(files, jobs, rank, "err" if err else "out", follow)
        elif err:
            raise UserError(f"--err: {files.run_dir.name} was not submitted by mstkd submit; leave --err out to see its own log")
        else:
            _own_log(files, rank, follow)
    except BrokenPipeError:  # the reader, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cancel(
    run_or_job: RunOrJob,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Cancel the live jobs of a run or a sweep, or one job and those that wait for it. A running one saves and ends.

    Example: mstkd cancel mst_kdnet_phantom
    """
    target = find(run_or_job, runs_dir)
    runs = [read_run(run_dir) for run_dir in target.run_dirs]
    queue = look_up({id for files in runs for id in files.ids})
    untold = [id for files in runs for id in files.untold()]
    if untold and not queue.answered:
        raise UserError(f"{queue.note}: jobs of {run_or_job} may be live; where SLURM answers: scancel {' '.join(untold)}")
    plan = {files: live for files in runs if (live := _to_cancel(files, target, queue))}
    for files, live in plan.items():
        typer.echo(f"{files.run_dir.name}: " + ", ".join(f"job {job.id} ({_what(files, job)}{job.state})" for job in live))
    # who waits for another goes first, so that nothing starts in between
    ids = [job.id for live in plan.values() for job in reversed(live)]
    if not ids:
        _say_nothing_live(run_or_job, runs)
        return
    if len(ids) > 1 and not yes and sys.stdin.isatty():
        typer.confirm(f"Cancel these {len(ids)} jobs?", abort=True)
    scancel(ids)
    running = any(not job.waiting for live in plan.values() for job in live)
    meanwhile = "; what runs saves and ends, see mstkd status" if running else ""
    typer.echo(f"cancelled {len(ids)} job{'s' if len(ids) > 1 else ''}{meanwhile}")


# status


def _write_json(found: list[RunStatus], file: Path) -> None:
    runs = [{**asdict(run), "run_dir": str(run.run_dir), "name": run.run_dir.name} for run in found]
    text = dumps(runs, indent=1)
    typer.echo(text) if str(file) == "-" else file.write_text(text + "\n")


def _print_runs(found: list[RunStatus]) -> None:
    print_table(_table([("run", [run.name for run in found]), *_columns(found)]))
    _print_reasons(found)


def _print_sweep(axes: tuple[str, ...], ranking: list[Member], by_run: dict[Path, RunStatus]) -> None:
    found = [by_run[member.run_dir] for member in ranking]
    scored = next((member.stage for member in ranking if member.stage), None)
    places = [str(place) if member.score is not None else "" for place, member in enumerate(ranking, 1)]
    columns = [("place", places), ("run", [run.name for run in found])]
    columns += [(axis, [member.values[i] for member in ranking]) for i, axis in enumerate(axes)]
    columns += [
        (f"best val/score ({scored})", ["" if member.score is None else f"{member.score:.4f}" for member in ranking]),
        ("at step", ["" if member.step is None else str(member.step) for member in ranking]),
    ]
    print_table(_table([*columns, *_columns(found)]))
    _print_reasons(found)


def _columns(found: list[RunStatus]) -> list[tuple[str, list]]:
    return [
        ("state", [Text(run.state, COLOURS.get(run.state, "")) for run in found]),
        ("job", [" ".join(run.jobs) for run in found]),
        ("nodes", [run.nodes for run in found]),
        ("stage", [run.stage or "" for run in found]),
        ("step", ["" if run.step is None else f"{run.step}/{run.total_steps}" for run in found]),
        ("step/s", ["" if run.steps_per_s is None else f"{run.steps_per_s:.3g}" for run in found]),
        ("ETA", ["" if run.eta_s is None else duration(run.eta_s) for run in found]),
        ("attempts", [str(run.attempts or "") for run in found]),
        ("requeues", [run.requeues for run in found]),
        ("heartbeat", ["" if run.beat_age_s is None else f"{duration(run.beat_age_s)} ago" for run in found]),
        ("MLflow", [(run.mlflow_run or "")[:8] for run in found]),
    ]


def _table(columns: list[tuple[str, list]]) -> Table:
    """Columns that say nothing are left out."""
    shown = [(title, cells) for title, cells in columns if any(str(cell) for cell in cells)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, _ in shown:
        table.add_column(title, overflow="fold")
    for row in zip(*(cells for _, cells in shown), strict=True):
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def _print_reasons(found: list[RunStatus]) -> None:
    for run in found:
        if run.reason:
            typer.echo(f"{run.name}: {run.state}: {run.reason}")


def _last_change(run_dir: Path) -> float:
    """So that the newest run stands last, next to the prompt."""
    paths = (run_dir / name for name in ("config.yaml", "jobs.json", "attempts", "heartbeats"))
    return max(path.stat().st_mtime for path in paths if path.exists())


# logs


def _job_logs(files: RunFiles, jobs: list[SubmittedJob], rank: int, stream: Literal["out", "err"], follow: bool) -> None:
    """The log of the newest of `jobs` that has one; with `follow` also of those after it, as they start."""
    runs_dir = files.run_dir.parent
    logged = [place for place, job in enumerate(jobs) if job.log(runs_dir, rank, stream).is_file()]
    first = logged[-1] if logged else 0
    _check_rank(files, jobs[first:], rank)
    if not follow:
        if logged:
            _copy(jobs[first].log(runs_dir, rank, stream), 0)
        queue = look_up(job.id for job in jobs)
        for place, job in enumerate(jobs[first:], first):
            if place not in logged or job.id in queue.jobs and queue.jobs[job.id].waiting:
                typer.echo(_why_no_more(job, queue), err=True)
        return
    for job in jobs[first:]:
        path = job.log(runs_dir, rank, stream)
        _follow(path, _JobWatch(files, job, rank))
        if not path.is_file():
            typer.echo(f"job {job.id} has ended, and rank {rank} has written nothing", err=True)
    _say_state(files)


class _JobWatch:
    """Whether a job is over, asked of SLURM at most every ASK_S seconds; says on stderr why a job waits, when that changes."""

    def __init__(self, files: RunFiles, job: SubmittedJob, rank: int):
        self.files, self.job, self.rank = files, job, rank
        self.said, self.asked = None, -ASK_S

    def __call__(self) -> bool:
        if time.monotonic() - self.asked < ASK_S:
            return False
        queue, self.asked = look_up([self.job.id]), time.monotonic()
        self.files = read_run(self.files.run_dir)
        _check_rank(self.files, [self.job], self.rank)
        if not queue.answered:  # an interrupted job may come back, and only SLURM could tell
            ending = self.files.ending_of(self.job.id)
            return ending is not None and ending.outcome in ("finished", "stopped", "bad_input")
        now = queue.jobs.get(self.job.id)
        waiting = (now.state, now.reason) if now and now.waiting else None  # less the expected start, which moves all the time
        if waiting and waiting != self.said:
            typer.echo(_why_no_more(self.job, queue), err=True)
        self.said = waiting
        return now is None or not now.live


def _check_rank(files: RunFiles, jobs: list[SubmittedJob], rank: int) -> None:
    worlds = [attempt.world_size for job in jobs for attempt in files.attempts_of(job.id) if attempt.world_size]
    if worlds and rank >= max(worlds):
        raise UserError(f"--rank {rank}: {files.run_dir.name} has the ranks 0 to {max(worlds) - 1}")


def _why_no_more(job: SubmittedJob, queue: Queue) -> str:
    now = queue.jobs.get(job.id)
    if now is None:
        return f"job {job.id} has written nothing" + (f"; {queue.note}" if queue.note else " and is not in the queue")
    if not now.waiting:
        return f"job {job.id} is {now.state} and has written nothing" + (" yet" if now.live else "")
    return f"job {job.id} is {now.state}: {waits_for(now, job)}"


def _own_log(files: RunFiles, rank: int, follow: bool) -> None:
    """What the run itself noted, for one that mstkd submit did not start."""
    path = files.run_dir / "logs" / f"rank-{rank}.log"
    if not path.is_file():
        ranks = sorted(int(other.stem.removeprefix("rank-")) for other in path.parent.glob("rank-*.log"))
        has = f"there are logs of the ranks {', '.join(map(str, ranks[:16]))}" if ranks else "it has not begun training"
        raise UserError(f"{files.run_dir.name}: no log of rank {rank}; {has}")
    if follow:
        _follow(path, _RunWatch(files.run_dir))
        _say_state(files)
    else:
        _copy(path, 0)


class _RunWatch:
    """Whether a run is over, looked up at most every ASK_S seconds."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.asked = run_dir, -ASK_S

    def __call__(self) -> bool:
        if time.monotonic() - self.asked < ASK_S:
            return False
        ((run,), _), self.asked = statuses([self.run_dir]), time.monotonic()
        last = read_run(self.run_dir).last
        silent = run.state == "hung" and last is not None and last.ending is None  # some ranks still show signs of life
        return run.state not in ("pending", "requeued", "running") and not silent


def _follow(path: Path, over: Callable[[], bool]) -> None:
    """Print `path` as it grows, from its beginning, also when another file takes its place, until `over()` and all is read."""
    inode, position, ended = None, 0, False
    while True:
        if path.is_file():
            now = path.stat()
            if now.st_ino != inode or now.st_size < position:
                inode, position = now.st_ino, 0
            position = _copy(path, position)
        if ended:
            return
        ended = over()
        time.sleep(POLL_S)


def _copy(path: Path, position: int) -> int:
    """Print the file from `position` on; returns where it ended."""
    out: BinaryIO = sys.stdout.buffer
    with path.open("rb") as log:
        log.seek(position)
        shutil.copyfileobj(log, out)
        out.flush()
        return log.tell()


def _say_state(files: RunFiles) -> None:
    (run,), _ = statuses([files.run_dir])
    typer.echo(f"{run.name}: {run.state}" + (f": {run.reason}" if run.reason else ""), err=True)


# cancel


def _to_cancel(files: RunFiles, target: Target, queue: Queue) -> list[SlurmJob]:
    """The run's live jobs, in order; of a named job it and those that wait for it."""
    chosen: list[str] = []
    for id in files.ids:
        after = next((job.after for job in files.jobs if job.id == id), None)
        if target.covers(id) or after in chosen:
            chosen.append(id)
    return [job for job in queue.live(chosen) if files.goes_on(job)]


def _what(files: RunFiles, job: SlurmJob) -> str:
    submitted = next((one for one in files.jobs if one.id == job.id), None)
    return f"{' '.join([submitted.kind, *submitted.stages])}, " if submitted else ""


def _say_nothing_live(word: str, runs: list[RunFiles]) -> None:
    """Raises UserError for a run that goes on where SLURM cannot end it."""
    found, _ = statuses([files.run_dir for files in runs])
    for files, run in zip(runs, found, strict=True):
        if run.state == "running" and files.last.job is None:
            raise UserError(
                f"{run.name} runs outside SLURM on {run.nodes}: end it there by Ctrl-C, or kill -TERM of the mstkd or deepspeed process "
                "that started it; it saves first"
            )
    states = ", ".join(f"{run.name} is {run.state}" for run in found[:6]) + (" ..." if len(found) > 6 else "")
    typer.echo(f"{word}: nothing to cancel, no job is live" + (f"; {states}" if states else ""))
