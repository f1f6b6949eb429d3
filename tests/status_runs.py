"""Run folders as training and `mstkd submit` leave them, for the tests of `mstkd status`, `logs` and `cancel`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from mstkd import attempts
from mstkd.launch.jobs import SubmittedJob
from mstkd.launch.status import statuses

MSTKD = str(Path(sys.executable).parent / "mstkd")
LONG_AGO_S = 3600


def mstkd(*words, runs: Path, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [MSTKD, words[0], *words[1:], "--runs-dir", str(runs)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=120)


def make_run(runs: Path, name: str, **config) -> Path:
    run = runs / name
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"name": name, "watchdog": {"heartbeat_s": 1.0}, **config}))
    return run


def begin(run: Path, job: str | None = None, world: int = 1, silent: tuple[int, ...] = (), **beat) -> int:
    """An attempt whose ranks have just shown a sign of life; those in `silent` and, with (-1,), the start itself long ago."""
    number = attempts.begin(run, world, job)
    (run / "heartbeats").mkdir(exist_ok=True)
    place = {"stage": "distill", "step": 30, "total_steps": 100, "phase": "step", "part": 0, "steps_per_s": 2.0, "progress": time.time()}
    for rank in range(world):
        path = run / "heartbeats" / f"rank-{rank}.json"
        path.write_text(json.dumps({"rank": rank, "host": f"host{rank}", "attempt": number, **place, **beat}))
        if rank in silent or -1 in silent:
            os.utime(path, (time.time() - LONG_AGO_S,) * 2)
    if -1 in silent:
        os.utime(run / "attempts" / f"{number:04d}.json", (time.time() - LONG_AGO_S,) * 2)
    return number


def submitted(id: str, run: Path, kind="train", after=None, stages=("distill",)) -> SubmittedJob:
    return SubmittedJob(
        id=id, kind=kind, stages=list(stages) if kind == "train" else [], cluster="devcluster",
        submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"), after=after, folder=f"{run.name}/jobs",
    )  # fmt: skip


def state_of(run: Path) -> tuple[str, str]:
    (found,), _ = statuses([run])
    return found.state, found.reason


def make_sweep(runs: Path) -> list[Path]:
    names = [f"S-tau{tau}" for tau in (4, 7, 10)]
    (runs / "S").mkdir()
    (runs / "S" / "sweep.json").write_text(json.dumps({"axes": {"method.tau": [4, 7, 10]}, "runs": names}))
    return [make_run(runs, name, method={"name": "toy", "tau": tau}) for name, tau in zip(names, (4, 7, 10), strict=True)]
