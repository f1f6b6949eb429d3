"""How a job ends: asked by the batch script when all its ranks have left, it says whether to start again.

    python -m mstkd.launch.verdict JOB_FOLDER CODE ATTEMPTS_BEFORE      prints "requeue" or an exit code
"""

from __future__ import annotations  # under pyxis this runs outside of the container, in the host's python3

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mstkd.attempts import CRASHES, Attempt, Ending, begin, end, latest, read

WARNED, STOPPED = 128 + 12, 128 + 15  # as if USR2 or SIGTERM had ended the process
BAD_INPUT = 2


@dataclass(frozen=True)
class Task:
    """What a batch script runs: one line of the job folder's tasks.json, by its place in the array."""

    run_dir: str
    kind: str  # train, evaluate
    requeues: int  # the budget
    heartbeat_s: float = 10.0  # so old may be what a killed rank said last


@dataclass(frozen=True)
class Verdict:
    requeue: bool
    code: int
    why: str  # one line for the job's log


def write_tasks(folder: Path, tasks: list[Task]) -> None:
    (Path(folder) / "tasks.json").write_text(json.dumps([asdict(task) for task in tasks]))


def read_task(folder: Path) -> Task:
    tasks = json.loads((Path(folder) / "tasks.json").read_text())
    return Task(**tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))])


def judge_evaluation(task: Task, code: int) -> Verdict:
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if code == WARNED and restarts < task.requeues:
        return Verdict(True, code, f"evaluation interrupted; starts again ({restarts + 1} of {task.requeues})")
    return Verdict(False, code, f"evaluation ended with code {code}")


def judge_training(task: Task, code: int, before: int, job: str | None) -> Verdict:
    """`before`: attempts that the run folder held when the batch script started; `job`: SLURM's id of it."""
    if latest(Path(task.run_dir)) > before + 1:
        return Verdict(False, code or 1, "another start of this run has taken over")
    ending = _ending(task, code, before, job)
    own_attempts = [attempt for attempt in read(Path(task.run_dir)) if attempt.job == job]
    if ending.outcome == "finished":
        return Verdict(False, 0, ending.reason)
    if ending.outcome == "stopped":
        return Verdict(False, STOPPED, f"stopped {ending.reason} at {_place(ending)}; everything is saved")
    if ending.outcome == "bad_input":
        return Verdict(False, BAD_INPUT, ending.reason)
    code = WARNED if ending.outcome == "interrupted" else code or 1
    if _crashed_there_before(own_attempts, _slack(task, ending)):
        return Verdict(False, code, f"FAILED: crashed twice at {_place(ending)}: {ending.reason}")
    used = sum(_asked_for_requeue(attempt) for attempt in own_attempts) - 1
    if used >= task.requeues:
        return Verdict(False, code, f"FAILED: {ending.outcome} at {_place(ending)} and all {task.requeues} requeues are used: {ending.reason}")
    return Verdict(True, code, f"{ending.outcome} at {_place(ending)} ({ending.reason}); requeue {used + 1} of {task.requeues}")


def _ending(task: Task, code: int, before: int, job: str | None) -> Ending:
    """How this start ended; noted here, if no rank could."""
    run_dir = Path(task.run_dir)
    number = before + 1
    if latest(run_dir) < number:
        if code == 0:  # a start that stops early notes it
            return Ending("finished", "all stages were trained already")
        if code == BAD_INPUT:
            return Ending("bad_input", "see the message above")
        outcome = "interrupted" if code == WARNED else "killed"
        number = begin(run_dir, 0, job)
        end(run_dir, number, Ending(outcome, f"exit code {code} before training began"))
    else:
        beat = _last_beat(run_dir, number)
        place = (beat["stage"], beat["step"]) if beat else ()
        end(run_dir, number, Ending("killed", f"a rank left with code {code} and without a word", *place))
    return next(attempt for attempt in read(run_dir) if attempt.number == number).ending


def _last_beat(run_dir: Path, number: int) -> dict | None:
    """What rank 0 said last in attempt `number`."""
    path = run_dir / "heartbeats" / "rank-0.json"
    beat = json.loads(path.read_text()) if path.is_file() else None
    return beat if beat and beat["attempt"] == number else None


def _slack(task: Task, ending: Ending) -> int:
    """How many steps the noted place of an ending may lag behind the true one."""
    if ending.outcome != "killed":
        return 0
    beat = _last_beat(Path(task.run_dir), latest(Path(task.run_dir)))
    return math.ceil((beat.get("steps_per_s") or 0) * task.heartbeat_s) if beat else 0


def _crashed_there_before(found: list[Attempt], slack: int) -> bool:
    endings = [attempt.ending for attempt in found[-2:]]
    if len(endings) < 2 or not all(ending and ending.outcome in CRASHES for ending in endings):
        return False
    before, now = endings
    return before.stage == now.stage and abs((before.step or 0) - (now.step or 0)) <= slack


def _asked_for_requeue(attempt: Attempt) -> bool:
    return attempt.ending is not None and attempt.ending.outcome in (*CRASHES, "interrupted")


def _place(ending: Ending) -> str:
    return f"stage {ending.stage}, step {ending.step}" if ending.stage else "the start"


def conclude_in_mlflow(run_dir: Path, failed: bool) -> None:
    """A run that ended for good must not look alive, and its sweep on a tracking server is ranked anew."""
    try:
        from mstkd.run_folder import read_run_config
        from mstkd.track import ranking, reconcile

        config = read_run_config(run_dir)
        if failed:  # one that could say so itself has done it
            reconcile.close(config, run_dir, reconcile.left_running(config, run_dir), "FAILED", time.time())
        ranking.rank_on_server(config, run_dir)
    except Exception as error:  # the exit code matters more; `mstkd doctor --fix` can do it later
        print(f"MLflow may still show the run as RUNNING: {type(error).__name__}: {error}", file=sys.stderr)


def main() -> None:
    folder, code, before = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID")
    task = read_task(folder)
    verdict = judge_training(task, code, before, job) if task.kind == "train" else judge_evaluation(task, code)
    print(verdict.why, file=sys.stderr)
    taken_over = task.kind == "train" and latest(Path(task.run_dir)) > before + 1
    if task.kind == "train" and not verdict.requeue and not taken_over:
        conclude_in_mlflow(Path(task.run_dir), failed=verdict.code not in (0, STOPPED))
    print("requeue" if verdict.requeue else verdict.code)


if __name__ == "__main__":
    main()
