"""How a job ends: asked by the batch script when all its ranks have left, it says whether to start again.

    python -m mstkd.launch.verdict JOB_FOLDER CODE ATTEMPTS_BEFORE      prints "requeue" or an exit code
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mstkd.attempts import CRASHES, Attempt, Ending, begin, end, latest, read

INTERRUPTED, STOPPED = 128 + 12, 128 + 15  # as if USR2 or SIGTERM had ended the process
BAD_INPUT = 2


@dataclass(frozen=True)
class Task:
    """What a batch script runs: one line of the job folder's tasks.json, by its place in the array."""

    run_dir: str
    kind: str  # train, evaluate
    requeues: int  # the budget


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
    if code == INTERRUPTED and restarts < task.requeues:
        return Verdict(True, code, f"evaluation interrupted; starts again ({restarts + 1} of {task.requeues})")
    return Verdict(False, code, f"evaluation ended with code {code}")


def judge_training(task: Task, code: int, before: int, job: str | None) -> Verdict:
    """`before`: attempts that the run folder held when the batch script started; `job`: SLURM's id of it."""
    ending = _ending(task, code, before, job)
    all_attempts = read(Path(task.run_dir))
    if ending.outcome == "finished":
        return Verdict(False, 0, ending.reason)
    if ending.outcome == "stopped":
        return Verdict(False, STOPPED, f"stopped {ending.reason} at {_place(ending)}; everything is saved")
    if ending.outcome == "bad_input":
        return Verdict(False, BAD_INPUT, ending.reason)
    code = INTERRUPTED if ending.outcome == "interrupted" else code or 1
    if _crashed_there_before(all_attempts):
        return Verdict(False, code, f"FAILED: crashed twice at {_place(ending)}: {ending.reason}")
    used = sum(_asked_for_requeue(attempt, job) for attempt in all_attempts) - 1
    if used >= task.requeues:
        return Verdict(False, code, f"FAILED: {ending.outcome} at {_place(ending)} and all {task.requeues} requeues are used: {ending.reason}")
    return Verdict(True, code, f"{ending.outcome} at {_place(ending)} ({ending.reason}); requeue {used + 1} of {task.requeues}")


def _ending(task: Task, code: int, before: int, job: str | None) -> Ending:
    """How this start ended; noted here, if no rank could."""
    run_dir = Path(task.run_dir)
    number = latest(run_dir)
    if number <= before:
        if code == BAD_INPUT:
            return Ending("bad_input", "see the message above")
        number = begin(run_dir, 0, job)
        end(run_dir, number, Ending("killed", f"exit code {code} before training began"))
    else:
        end(run_dir, number, Ending("killed", f"a rank left with code {code} and without a word", *_last_place(run_dir)))
    return read(run_dir)[-1].ending


def _last_place(run_dir: Path) -> tuple[str | None, int | None]:
    path = run_dir / "heartbeats" / "rank-0.json"
    if not path.is_file():
        return None, None
    beat = json.loads(path.read_text())
    return beat["stage"], beat["step"]


def _crashed_there_before(found: list[Attempt]) -> bool:
    endings = [attempt.ending for attempt in found[-2:]]
    if len(endings) < 2 or not all(ending and ending.outcome in CRASHES for ending in endings):
        return False
    return (endings[0].stage, endings[0].step) == (endings[1].stage, endings[1].step)


def _asked_for_requeue(attempt: Attempt, job: str | None) -> bool:
    return attempt.job == job and attempt.ending is not None and attempt.ending.outcome in (*CRASHES, "interrupted")


def _place(ending: Ending) -> str:
    return f"stage {ending.stage}, step {ending.step}" if ending.stage else "the start"


def close_in_mlflow(run_dir: Path) -> None:
    """A run that ended for good must not look alive; one that could say so itself has done it."""
    try:
        from mstkd.run_folder import read_run_config
        from mstkd.track import reconcile

        config = read_run_config(run_dir)
        reconcile.close(config, run_dir, reconcile.left_running(config, run_dir), "FAILED", time.time())
    except Exception as error:  # the exit code matters more; `mstkd doctor --fix` can do it later
        print(f"MLflow still shows the run as RUNNING: {type(error).__name__}: {error}", file=sys.stderr)


def main() -> None:
    folder, code, before = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID")
    task = read_task(folder)
    verdict = judge_training(task, code, before, job) if task.kind == "train" else judge_evaluation(task, code)
    print(verdict.why, file=sys.stderr)
    if task.kind == "train" and not verdict.requeue and verdict.code not in (0, STOPPED):
        close_in_mlflow(Path(task.run_dir))
    print("requeue" if verdict.requeue else verdict.code)


if __name__ == "__main__":
    main()
