"""What a run is doing: its folder and SLURM's queue, put together. Reads only; data, no printing.

The folder says how far the run is and how each attempt ended, the queue whether a job is still to come.
Without SLURM, or where it does not answer, the heartbeats decide whether a run is alive.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from mstkd.config import WatchdogConfig
from mstkd.errors import UserError
from mstkd.launch.jobs import SubmittedJob, read_jobs
from mstkd.launch.queue import Queue, SlurmJob, look_up

State = Literal["not started", "pending", "requeued", "running", "finished", "stopped", "interrupted", "failed", "hung", "dead", "unknown"]
"""requeued: it ran and waits to go on. stopped: somebody decided. interrupted: saved, and no job is queued to go on.
hung: ranks are silent or wait for each other. dead: gone without a word. unknown: nothing left to tell."""
SILENT_BEATS, SHOWN_LATE_S = 4, 60.0  # as the watchdog counts, and a file system may show a beat so much later
CONCLUSIVE = ("finished", "bad_input")  # endings after which a job is never queued again; after SIGTERM it may be, by scontrol requeue
OF_OUTCOME: dict[str, State] = {
    "finished": "finished", "interrupted": "interrupted", "stopped": "stopped", "bad_input": "failed", "failed": "failed",
    "hung": "hung", "killed": "failed",
}  # fmt: skip
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, yaml.YAMLError)  # what damaged files of a run folder lead to


@dataclass(frozen=True)
class RunStatus:
    """One run, now. None: not known, or not under way."""

    run_dir: Path
    state: State
    reason: str = ""  # one line; "" where the state says it all
    jobs: tuple[str, ...] = ()  # the live ones, else the newest
    nodes: str = ""
    stage: str | None = None
    step: int | None = None  # updates done in the stage
    total_steps: int | None = None
    steps_per_s: float | None = None
    eta_s: float | None = None  # to the end of the stage
    attempts: int = 0
    requeues: str = ""  # of the newest job, e.g. "2/20"
    beat_age_s: float | None = None  # since the newest sign of life of any rank
    mlflow_run: str | None = None

    @property
    def name(self) -> str:
        return self.run_dir.name


@dataclass(frozen=True)
class Seen:
    """A rank's last sign of life (mstkd/engine/heartbeat.py), and when the file system wrote it."""

    beat: dict[str, Any]
    written: float  # seconds since 1970


class RunFiles:
    """What a run folder says. Raises ValueError, KeyError or TypeError if its files are not what they should be."""

    def __init__(self, run_dir: Path):
        from mstkd import attempts

        self.run_dir = Path(run_dir)
        self.jobs = read_jobs(self.run_dir)
        self.attempts = attempts.read(self.run_dir)
        self.last = self.attempts[-1] if self.attempts else None
        self.seen = [seen for path in (self.run_dir / "heartbeats").glob("rank-*.json") if (seen := _read_beat(path))]

    @property
    def ids(self) -> list[str]:
        """All its jobs: those submitted, then those that a batch script of one's own started."""
        return list(dict.fromkeys([*(job.id for job in self.jobs), *(a.job for a in self.attempts if a.job)]))

    @cached_property
    def chain(self) -> list[SubmittedJob]:
        """The newest submission: its jobs, each waiting for the one before. [] if the run was started otherwise since."""
        if not self.jobs or self._started_otherwise():
            return []
        chain, by_id = [self.jobs[-1]], {job.id: job for job in self.jobs}
        while chain[0].after in by_id:
            chain.insert(0, by_id[chain[0].after])
        return chain

    def _started_otherwise(self) -> bool:
        if self.last is None or self.last.job in {job.id for job in self.jobs}:
            return False
        return datetime.fromisoformat(self.last.started) > datetime.fromisoformat(self.jobs[-1].submitted)

    def attempts_of(self, id: str) -> list:
        return [attempt for attempt in self.attempts if attempt.job == id]

    def ending_of(self, id: str):
        """How the newest attempt of a job ended; None if it has none or goes on."""
        own = self.attempts_of(id)
        return own[-1].ending if own else None

    def untold(self) -> list[str]:
        """Jobs that may be live for all that the folder says."""
        return [id for id in self.ids if not (ending := self.ending_of(id)) or ending.outcome not in CONCLUSIVE]

    def goes_on(self, job: SlurmJob) -> bool:
        """Whether a live job still works for this run; an allocation outlives what a person started in it."""
        return job.waiting or job.id in {submitted.id for submitted in self.jobs} or self.ending_of(job.id) is None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml as it stands: another version's keys must not hide a run."""
        path = self.run_dir / "config.yaml"
        return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}

    @property
    def main_beat(self) -> dict[str, Any] | None:
        """Of the newest attempt that left any: the lowest rank's."""
        return max((seen.beat for seen in self.seen), key=lambda beat: (beat["attempt"], -beat["rank"]), default=None)

    def alive(self, now: float) -> tuple[State, str]:
        """Of the newest attempt, if it has no ending: by its heartbeats alone."""
        own = [seen for seen in self.seen if seen.beat["attempt"] == self.last.number]
        begun = (self.run_dir / "attempts" / f"{self.last.number:04d}.json").stat().st_mtime
        age_s = now - max([begun, *(seen.written for seen in own)])
        beat_s = self.config.get("watchdog", {}).get("heartbeat_s", WatchdogConfig().heartbeat_s)
        limit_s = silence_limit_s(beat_s)
        if age_s > limit_s:
            return "dead", f"no sign of life for {duration(age_s)}"
        silent = sorted((seen for seen in own if now - seen.written > limit_s), key=lambda seen: seen.beat["rank"])
        if silent:
            named = ", ".join(f"rank {seen.beat['rank']} on {seen.beat['host']}" for seen in silent[:4])
            more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
            return "hung", f"no sign of life from {named}{more} for {duration(now - max(seen.written for seen in silent))}"
        return "running", ""


def silence_limit_s(heartbeat_s: float) -> float:
    """After so long without a sign of life a run, or a rank, counts as gone."""
    return SHOWN_LATE_S + SILENT_BEATS * heartbeat_s


def read_run(run_dir: Path) -> RunFiles:
    """As RunFiles, for a command about one run. Raises UserError."""
    try:
        return RunFiles(run_dir)
    except UNREADABLE as error:
        raise UserError(f"{run_dir}: its files cannot be read: {_one_line(error)}") from None


def statuses(run_dirs: Iterable[Path]) -> tuple[list[RunStatus], str | None]:
    """The status of each run, in the given order, and one line if SLURM was needed and did not answer.

    One squeue and at most one sacct for all of them. A folder that cannot be read is "unknown", and its reason says why.
    """
    found: list[RunFiles | RunStatus] = []
    for run_dir in run_dirs:
        try:
            found.append(RunFiles(run_dir))
        except UNREADABLE as error:
            found.append(_unknown(run_dir, error))
    readable = [files for files in found if isinstance(files, RunFiles)]
    queue = look_up({id for files in readable for id in files.untold()}, {id for files in readable for id in _newest_untold(files)})
    now = time.time()
    return [_readable_status(files, queue, now) if isinstance(files, RunFiles) else files for files in found], queue.note


def _readable_status(files: RunFiles, queue: Queue, now: float) -> RunStatus:
    """One damaged folder must not hide the others."""
    try:
        return _status(files, queue, now)
    except UNREADABLE as error:
        return _unknown(files.run_dir, error)


def _unknown(run_dir: Path, error: Exception) -> RunStatus:
    return RunStatus(Path(run_dir), "unknown", f"its files cannot be read: {_one_line(error)}")


def _newest_untold(files: RunFiles) -> list[str]:
    """What became of older jobs no longer matters."""
    newest = {job.id for job in files.chain} or {files.last.job if files.last else None}
    return [id for id in files.untold() if id in newest]


def _status(files: RunFiles, queue: Queue, now: float) -> RunStatus:
    live = [job for job in queue.live(files.ids) if files.goes_on(job)]
    current = next((job for job in live if not job.waiting), live[0] if live else None)
    state, reason = _of_live(files, current, now) if current else _of_ended(files, queue, now)
    beat = files.main_beat or {}
    evaluating = current is not None and not current.waiting and _kind(files, current.id) == "evaluate"
    under_way = beat and state == "running" and not evaluating and beat["attempt"] == files.last.number
    rate = beat.get("steps_per_s") if under_way else None
    left = (beat["total_steps"] - beat["step"]) if beat.get("total_steps") else None
    newest = [files.chain[-1].id] if files.chain else [files.last.job] if files.last and files.last.job else []
    shown = files.seen if state in ("running", "hung") else []
    hosts = sorted({seen.beat["host"] for seen in shown if seen.beat["attempt"] == beat["attempt"]})
    return RunStatus(
        files.run_dir, state, reason,
        jobs=tuple(job.id for job in live) or tuple(newest),
        nodes=(current.nodes if current else "") or ",".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""),
        stage="evaluation" if evaluating else beat.get("stage"),
        step=beat.get("step") if left is not None and not evaluating else None,
        total_steps=beat.get("total_steps") if left is not None and not evaluating else None,
        steps_per_s=rate,
        eta_s=left / rate if rate and left is not None else None,
        attempts=len(files.attempts),
        requeues=_requeues(files, current.id if current else newest[0] if newest else None),
        beat_age_s=max(0.0, now - max(seen.written for seen in files.seen)) if files.seen else None,
        mlflow_run=_mlflow_run(files.run_dir),
    )  # fmt: skip


def _of_live(files: RunFiles, job: SlurmJob, now: float) -> tuple[State, str]:
    own = files.attempts_of(job.id)
    if job.waiting:
        submitted = next((submitted for submitted in files.jobs if submitted.id == job.id), None)
        return "requeued" if own else "pending", waits_for(job, submitted)
    if _kind(files, job.id) == "evaluate":
        return "running", "" if job.state == "RUNNING" else job.state
    if not own or own[-1].ending:
        told = f"attempt {own[-1].number} is over ({own[-1].ending.reason})" if own else "training has not begun"
        return "running", f"the job is {job.state}; {told}"
    state, reason = files.alive(now)
    if state == "running":
        return "running", "" if job.state == "RUNNING" else job.state
    return "hung", f"{reason}, and job {job.id} is {job.state}"


def waits_for(job: SlurmJob, submitted: SubmittedJob | None) -> str:
    """Why a job waits, in SLURM's word, and when SLURM expects it to start."""
    reason = f"after job {submitted.after}" if submitted and submitted.after and job.reason == "Dependency" else job.reason or job.state
    return reason + (f", expected to start {job.starts}" if job.starts else "")


def _of_ended(files: RunFiles, queue: Queue, now: float) -> tuple[State, str]:
    """The first job of the newest submission that did not come to a good end decides."""
    if not files.chain:
        return _of_attempt(files, files.last, queue, now) if files.last else ("not started", "")
    state, reason = "finished", ""
    for job in files.chain:
        own = files.attempts_of(job.id)
        if job.kind == "evaluate":
            state, reason = _of_evaluation(files, job, queue)
        elif own:
            state, reason = _of_attempt(files, own[-1], queue, now)
        else:
            state, reason = _of_unstarted(job, queue)
        if state != "finished":
            break
    return state, reason


def _of_attempt(files: RunFiles, attempt, queue: Queue, now: float) -> tuple[State, str]:
    job = queue.jobs.get(attempt.job)
    cancelled = job is not None and job.state == "CANCELLED"
    if attempt.ending is None:
        if cancelled:
            return "stopped", f"job {job.id} was cancelled and its ranks ended without a word; the last checkpoint holds"
        state, reason = files.alive(now) if attempt is files.last else ("dead", "")
        if attempt.job is None or not queue.answered:
            return state, reason
        told = f"job {attempt.job} is {job.state}" if job else f"job {attempt.job} is not in the queue"
        return "dead", "; ".join(filter(None, [told, reason]))
    ending = attempt.ending
    if cancelled and ending.outcome not in (*CONCLUSIVE, "stopped"):
        return "stopped", f"job {job.id} was cancelled while it waited to start again"
    state = OF_OUTCOME[ending.outcome]
    if state == "finished":
        return state, ""
    place = f"{ending.stage}, step {ending.step}: " if ending.stage else ""
    unsure = attempt.job and not queue.answered and ending.outcome not in CONCLUSIVE
    return state, place + ending.reason + ("; whether it is queued again cannot be asked" if unsure else "")


def _of_unstarted(job: SubmittedJob, queue: Queue) -> tuple[State, str]:
    """A train job that never came to an attempt."""
    slurm = queue.jobs.get(job.id)
    if not queue.answered:
        return "unknown", f"job {job.id} has not begun training, and the queue cannot be asked"
    if slurm is None and queue.knows_array_of(job.id):
        return "stopped", f"job {job.id} was cancelled before it began"
    if slurm is None:
        return "unknown", f"job {job.id} is not in the queue and has not begun training; see mstkd logs {job.id}"
    if slurm.state == "CANCELLED":
        return "stopped", f"job {job.id} was cancelled before it began"
    return "failed", f"job {job.id} is {slurm.state} and has not begun training; see mstkd logs {job.id}"


def _of_evaluation(files: RunFiles, job: SubmittedJob, queue: Queue) -> tuple[State, str]:
    slurm = queue.jobs.get(job.id)
    if slurm is None or slurm.state == "COMPLETED":
        done = slurm is not None or (files.run_dir / "evaluation" / "summary.json").is_file()
        return "finished", "" if done else f"nothing tells whether its evaluation, job {job.id}, has run"
    if slurm.state == "CANCELLED":
        return "stopped", f"trained; its evaluation, job {job.id}, was cancelled"
    return "failed", f"trained; its evaluation, job {job.id}, is {slurm.state}; see mstkd logs {job.id}"


def _kind(files: RunFiles, id: str) -> str:
    return next((job.kind for job in files.jobs if job.id == id), "train")


def _requeues(files: RunFiles, id: str | None) -> str:
    """How many of its starts again a submitted job has used, of how many."""
    job = next((job for job in files.jobs if job.id == id), None)
    path = files.run_dir.parent / job.folder / "tasks.json" if job else None
    if path is None or not path.is_file():
        return ""
    task = json.loads(path.read_text())[int(id.partition("_")[2] or 0)]
    return f"{max(0, len(files.attempts_of(id)) - 1)}/{task['requeues']}"


def _read_beat(path: Path) -> Seen | None:
    try:
        return Seen(json.loads(path.read_text()), path.stat().st_mtime)
    except FileNotFoundError:
        return None  # being replaced just now


def _mlflow_run(run_dir: Path) -> str | None:
    path = run_dir / "mlflow.json"
    return json.loads(path.read_text()).get("run_id") if path.is_file() else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def duration(seconds: float) -> str:
    """Short, for people: "42 s", "12 min", "3.4 h", "2.1 d"."""
    for unit_s, unit, digits in ((86400, "d", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
