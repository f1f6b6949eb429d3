"""What SLURM says about jobs: one call of its own command each, read into small records."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field

from mstkd.errors import UserError

ANSWER_S = 30  # a controller that needs longer is busy or gone
OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
)
WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"))
# Settings of a user's shell that would hide jobs from us, reformat the answer or make scancel ask
USER_DEFAULTS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")


class NoAnswerError(Exception):
    """SLURM could not be asked; one line says why."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as SLURM knows it now."""

    id: str  # "123", "123_4" in an array
    state: str  # SLURM's word, e.g. PENDING, RUNNING, NODE_FAIL
    reason: str = ""  # why it waits, or why it failed
    nodes: str = ""  # e.g. n[1-2]; "" without any
    starts: str = ""  # local time: when it started or is expected to; "" if SLURM does not know

    @property
    def live(self) -> bool:
        return self.state not in OVER

    @property
    def waiting(self) -> bool:
        return self.state in WAITING


@dataclass(frozen=True)
class Queue:
    """What SLURM knows of the jobs that were asked for, by id."""

    jobs: dict[str, SlurmJob] = field(default_factory=dict)
    answered: bool = False  # then a job that is not in `jobs` is not live
    note: str | None = None  # one line: why it did not answer

    def live(self, ids: Iterable[str]) -> list[SlurmJob]:
        return [self.jobs[id] for id in ids if id in self.jobs and self.jobs[id].live]

    def knows_array_of(self, id: str) -> bool:
        """Whether other members of the array are known. SLURM forgets at once a member that is cancelled while it waits."""
        array, member, _ = id.partition("_")
        return bool(member) and any(known.startswith(f"{array}_") for known in self.jobs)


def look_up(ids: Iterable[str], past: Iterable[str] = ()) -> Queue:
    """One squeue for the jobs `ids`; then, if squeue has forgotten any of `past`, one sacct for these.

    Never raises: where SLURM or its accounting does not answer, the run folders have to do.
    """
    ids = set(ids)
    if not ids:
        return Queue()
    try:
        jobs = squeue(ids)
    except NoAnswerError as error:
        return Queue(note=str(error))
    try:
        if forgotten := set(past) - jobs.keys():
            # the accounting comes late: what it calls live, and the controller does not know, is not
            told = {id: job for id, job in sacct(forgotten).items() if not job.live}
            # members that were cancelled one by one while they waited it has under the array's number alone
            jobs |= {id: job for id in forgotten if (job := told.get(id) or told.get(id.partition("_")[0]))}
    except NoAnswerError:
        pass  # many clusters keep no accounting
    return Queue(jobs, answered=True)


def squeue(ids: Iterable[str]) -> dict[str, SlurmJob]:
    """The jobs that the controller remembers: live ones, and ended ones for some minutes. Raises NoAnswerError."""
    try:
        # the reason comes last: it may hold anything
        text = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%S|%r", f"--jobs={_listed(ids)}")
    except NoAnswerError as error:
        if "Invalid job id" in str(error):  # its answer to a single id that it has forgotten
            return {}
        raise
    found = {}
    for line in text.splitlines():
        id, state, nodes, starts, reason = line.split("|", 4)
        found[id] = SlurmJob(id, state, "" if reason == "None" else reason, nodes, "" if starts == "N/A" else starts)
    return found


def sacct(ids: Iterable[str]) -> dict[str, SlurmJob]:
    """The jobs that the accounting knows. Raises NoAnswerError, also where there is no accounting."""
    words = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList,Start,Reason", f"--jobs={_listed(ids)}")
    found = {}
    for line in _ask("sacct", *words).splitlines():
        id, state, nodes, starts, reason = line.split("|", 4)
        state = state.split()[0]  # "CANCELLED by 0"
        for one in _members(id):
            found[one] = SlurmJob(
                one, state,
                reason="" if reason == "None" else reason,
                nodes="" if nodes == "None assigned" else nodes,
                starts="" if starts == "Unknown" else starts,
            )  # fmt: skip
    return found


def scancel(ids: Iterable[str]) -> None:
    """Cancel jobs: SLURM sends SIGTERM to each rank, and kills what is left KillWait seconds later. Raises UserError.

    A job that has ended meanwhile is no error.
    """
    if shutil.which("scancel") is None:
        raise UserError(f"scancel is not on PATH: cancel {', '.join(ids)} on a login node of the cluster")
    try:
        _ask("scancel", *ids)
    except NoAnswerError as error:
        raise UserError(f"{error}; the jobs {', '.join(ids)} may still run, see squeue") from None


def _ask(program: str, *words: str) -> str:
    """What the program prints. Raises NoAnswerError."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USER_DEFAULTS)}
    try:
        done = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment, timeout=ANSWER_S
        )
    except FileNotFoundError:
        raise NoAnswerError(f"{program} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{program} did not answer within {ANSWER_S} s") from None
    except OSError as error:
        raise NoAnswerError(f"{program}: {error.strerror}") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        line = said[-1] if said else f"exit code {done.returncode}"  # the last line is what it died of
        raise NoAnswerError(line if line.startswith((program, "slurm")) else f"{program}: {line}")
    return done.stdout


def _listed(ids: Iterable[str]) -> str:
    """For --jobs: an array is asked for once, not once per member."""
    return ",".join(sorted({id.partition("_")[0] for id in ids}))


def _members(id: str) -> list[str]:
    """["15_0", "15_1", "15_4"] from "15_[0-1,4%2]", which is how the accounting names members that never started."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", id)
    if match is None:
        return [id]
    members = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        members += range(int(first), int(last or first) + 1)
    return [f"{match[1]}_{member}" for member in members]
