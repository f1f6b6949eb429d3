"""Who a process is among the ranks: what launchers leave in the environment, and what contradicts itself."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from mstkd.engine.environment import PORTS, resolve_environment
from mstkd.errors import UserError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_TASK_PID": "1",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip


def without_launcher() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in RANKS and not name.startswith("SLURM_")}


@pytest.fixture
def start():
    """Sets the environment to that of a process that a launcher started with these variables; afterwards it is as before."""

    def set_to(*variables: dict[str, str]) -> None:
        clean = without_launcher()
        os.environ.clear()
        os.environ.update({**clean, **{key: value for part in variables for key, value in part.items()}})

    with patch.dict(os.environ):
        yield set_to


def ranks(rank, world, local_rank) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local_rank)}


MEETING = {"MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}


def test_without_a_launcher_a_process_is_alone(start):
    start()
    found = resolve_environment()
    assert (found.rank, found.world, found.local_rank) == (0, 1, 0)


def test_srun_decides_where_no_launcher_did(start):
    start(STEP)
    found = resolve_environment()
    assert (found.rank, found.world, found.local_rank) == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "gpu07" and int(os.environ["MASTER_PORT"]) in PORTS


def test_two_jobs_and_two_steps_of_a_job_meet_at_different_ports(start):
    ports = set()
    for job, step in (("4711", "0"), ("4711", "1"), ("4712", "0")):
        start(STEP, {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        resolve_environment()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3


def test_a_launcher_inside_srun_wins(start):
    start(STEP, ranks(9, 16, 1), MEETING)  # torchrun: eight ranks in each of two tasks
    assert (resolve_environment().rank, resolve_environment().world) == (9, 16)


@pytest.mark.parametrize("variables", [
    {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script
    # salloc's shell, or a batch script submitted from inside a step
    {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
], ids=["batch script", "interactive step"])  # fmt: skip
def test_the_shell_of_a_job_is_alone_whatever_the_job_holds(start, variables):
    start(variables)
    assert resolve_environment().world == 1


@pytest.mark.parametrize(("variables", "expected"), [
    ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not: unset RANK, or start the ranks with deepspeed, torchrun or srun"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "WORLD_SIZE is set and RANK is not: unset WORLD_SIZE"),
    ({**STEP, "WORLD_SIZE": "1"}, "WORLD_SIZE is set and RANK is not"),
    ({**ranks(2, 2, 0), **MEETING}, "RANK 2 and LOCAL_RANK 0 do not fit WORLD_SIZE 2: unset all three"),
    ({**ranks(0, 2, 2), **MEETING}, "LOCAL_RANK 2 do not fit WORLD_SIZE 2"),
    ({**ranks(-1, 2, 0), **MEETING}, "RANK -1"),
    (ranks(0, "two", 0), "WORLD_SIZE='two' is not a number: unset it"),
    (ranks(0, 2, 0), "MASTER_ADDR and MASTER_PORT are not set"),
    ({**STEP, **ranks(0, 1, 0)}, "srun started 4 tasks, but WORLD_SIZE is 1, left by another launcher"),
    ({**STEP, **ranks(0, 4, 0), **MEETING, "SLURM_TASK_PID": str(os.getpid())}, "task 3 of 4, but RANK is 0 and WORLD_SIZE 4, left by"),
    ({**STEP, "MASTER_ADDR": "localhost"}, "MASTER_ADDR is localhost in a step on 2 nodes"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused(start, variables, expected):
    start(variables)
    with pytest.raises(UserError) as caught:
        resolve_environment()
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_says_it_in_one_line_and_leaves_with_2(tmp_path):
    command = [Path(sys.executable).parent / "mstkd", "train", "mst_kdnet_phantom"]
    done = subprocess.run(command, cwd=tmp_path, env={**without_launcher(), "RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == 2
    fix = "unset RANK, or start the ranks with deepspeed, torchrun or srun"
    assert done.stderr.strip() == f"error: RANK is set and WORLD_SIZE is not: {fix}"
