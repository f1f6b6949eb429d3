"""The doctor's look at the runs: where MLflow keeps them, which of them a hard kill left RUNNING, how long a step and a save take."""

import sqlite3
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mstkd.config import RunConfig
from mstkd.errors import UserError
from mstkd.launch.doctor_finding import Finding, fail, ok, warn
from mstkd.launch.jobs import read_jobs
from mstkd.launch.queue import Queue, look_up
from mstkd.launch.status import silence_limit_s

RECENT = 20  # records that count for the times of a run
REACH_S = 5.0
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "stopped": "KILLED", "killed": "KILLED"}  # by outcome; others FAILED
EVALUATION_S = 24 * 3600  # an evaluation gives no sign of life; after a day it is taken for dead


@dataclass(frozen=True)
class Measured:
    """The slowest of a run's recent figures, in seconds."""

    run: str
    step_s: float
    save_s: float | None  # None: not recorded


def measured(runs_dir: Path) -> Measured | None:
    """Of the newest run in `runs_dir` that has logged a step rate; None without one."""
    from mstkd.track.jsonl import read_records

    paths = sorted(Path(runs_dir).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in paths:
        records = read_records(path)
        rates = [record["time/steps_per_s"] for record in records if record.get("time/steps_per_s")]
        saves = [record["time/save_s"] for record in records if record.get("time/save_s")]
        if rates:
            return Measured(path.parent.name, 1 / min(rates[-RECENT:]), max(saves[-RECENT:], default=None))
    return None


def findings(runs_dir: Path, fix: bool) -> Iterator[Finding]:
    """The stores, then each run that looks alive in MLflow and is not. With `fix` those are closed."""
    runs = {}
    for path in sorted(Path(runs_dir).glob("*/mlflow.json")):
        try:
            runs[path.parent] = _config(path.parent)
        except UserError as error:
            yield warn("run", str(error).split("\n")[0], "it was made by another version; MLflow is not asked about it")
    yield _local_store(Path(runs_dir) / "mlflow.db")
    down = set()
    for uri in sorted({config.tracking.uri for config in runs.values()} - {None}):
        finding = _given_store(uri)
        down |= {uri} if finding.state != "OK" else set()
        yield finding
    reachable = {folder: config for folder, config in runs.items() if config.tracking.uri not in down}
    yield from stale_runs(Path(runs_dir), reachable, fix)


def _config(run_dir: Path) -> RunConfig:
    from mstkd.run_folder import read_run_config

    return read_run_config(run_dir).model_copy(update={"runs_dir": str(run_dir.parent), "name": run_dir.name})


def _local_store(path: Path) -> Finding:
    if not path.exists():
        return ok("mlflow", f"{path}: made by the first run")
    return _sqlite(path)


def _given_store(uri: str) -> Finding:
    if uri.startswith("sqlite:///"):
        return _sqlite(Path(uri.removeprefix("sqlite:///")))
    if not uri.startswith(("http://", "https://")):
        return ok("mlflow", f"{uri}: not looked at")
    advice = "start the server, or train with tracking.uri=null; metrics.jsonl is written in any case"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_S):
            return ok("mlflow", f"{uri} answers")
    except urllib.error.HTTPError as error:
        return warn("mlflow", f"{uri} answers with HTTP status {error.code}", "check the address, and the password that the server wants")
    except (OSError, ValueError) as error:
        return warn("mlflow", f"{uri} does not answer: {getattr(error, 'reason', error)}", advice)


def _sqlite(path: Path) -> Finding:
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=REACH_S) as store:
            (count,) = store.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        return fail("mlflow", f"{path}: {error}", "move it away, and the next run makes a new one; metrics.jsonl has the figures, too")
    return ok("mlflow", f"{path}: {count} MLflow runs")


def stale_runs(runs_dir: Path, runs: dict[Path, RunConfig], fix: bool) -> Iterator[Finding]:
    """Runs that MLflow shows as RUNNING though nothing works on them. `runs`: the configuration by run folder."""
    queue = look_up(id for folder in runs for id in job_ids(folder))
    now = _clock_of(runs_dir)
    dead = {folder: end for folder, config in runs.items() if (end := ending(folder, config, queue, now)) is not None}
    if not dead:
        return
    from mstkd.track.reconcile import close, left_running

    for folder, end in dead.items():
        try:
            left = [run for run in left_running(runs[folder], folder) if _gone(folder, run, now)]
            if not left:
                continue
            parts = ", ".join(run.part or "the run itself" for run in left)
            told = f"{folder.name}: {end.why}, but MLflow shows it RUNNING ({parts})"
            if not fix:
                yield warn("mlflow run", told, f"mstkd doctor --fix sets it to {end.status}")
                continue
            close(runs[folder], folder, left, end.status, end.at)
            yield ok("mlflow run", f"{told}; now {end.status}")
        except Exception as error:  # whatever MLflow says, the other runs are looked at
            told = f"{folder.name}: {type(error).__name__}: {error}".splitlines()[0]
            yield warn("mlflow run", told, "see whether mstkd mlflow ui shows it")


def _gone(folder: Path, run, now: float) -> bool:
    """Stages end with the run; an evaluation may be at work now."""
    return run.part is None or (folder / run.part / "checkpoints").is_dir() or now - run.started > EVALUATION_S


@dataclass(frozen=True)
class End:
    """How a run that nothing works on came to its end."""

    status: str  # MLflow's
    why: str
    at: float  # seconds since 1970: the last sign of life


def ending(folder: Path, config: RunConfig, queue: Queue, now: float) -> End | None:
    """None if the run is alive, waits in the queue or may do so, or is too old to tell."""
    from mstkd import attempts

    made = attempts.read(folder)
    if not made:
        return None
    newest = made[-1]
    jobs = job_ids(folder)
    if jobs and (not queue.answered or queue.live(jobs)):
        return None
    signs = [folder / "attempts" / f"{newest.number:04d}.json", *(folder / "heartbeats").glob("rank-*.json")]
    last = max(path.stat().st_mtime for path in signs)
    if newest.ending is not None:
        return End(STATUS.get(newest.ending.outcome, "FAILED"), f"attempt {newest.number} ended ({newest.ending.outcome})", last)
    silence = now - last
    if silence <= silence_limit_s(config.watchdog.heartbeat_s):
        return None
    return End("KILLED", f"attempt {newest.number} gave no sign of life for {silence / 60:.0f} min", last)


def job_ids(folder: Path) -> set[str]:
    """SLURM's ids of all jobs of a run, submitted by mstkd or by hand."""
    from mstkd import attempts

    return {job.id for job in read_jobs(folder)} | {attempt.job for attempt in attempts.read(folder) if attempt.job}


def _clock_of(folder: Path) -> float:
    """Now, by the clock that stamps the heartbeats, which may be a file server's."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".mstkd-doctor.", dir=folder) as file:
            file.write(b"now")
            file.flush()
            return Path(file.name).stat().st_mtime
    except OSError:
        return time.time()
