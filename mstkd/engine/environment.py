"""Who this process is among the ranks: the same answer under deepspeed, torchrun, srun, submitit or a bare python.

The only file that reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and SLURM's variables of the step.
"""

import os
from dataclasses import dataclass

import torch

from mstkd.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PORTS = range(10000, 30000)  # below the ports that the kernel gives to outgoing connections


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def resolve_environment() -> Ranks:
    """Rank, world size and device. Completes the variables above in the environment, where DeepSpeed reads them.

    What a launcher has set wins; else srun's, which starts one process per task; else this process is alone.
    Raises UserError where they are incomplete or contradict each other.
    """
    env, tasks = os.environ, _tasks_of_step()
    given = [name for name in RANK_VARIABLES if name in env]
    if given and len(given) < len(RANK_VARIABLES):
        missing = next(name for name in RANK_VARIABLES if name not in env)
        raise UserError(f"{given[0]} is set and {missing} is not: unset {given[0]}, or start the ranks with deepspeed, torchrun or srun")
    if not given and tasks:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], str(tasks), env["SLURM_LOCALID"]
        if int(env["WORLD_SIZE"]) > 1:
            env.setdefault("MASTER_ADDR", _first_host())
            env.setdefault("MASTER_PORT", str(_port()))
    elif not given:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = "0", "1", "0"
    rank, world, local_rank = (_number(name) for name in RANK_VARIABLES)
    _check(rank, world, local_rank, tasks)
    return Ranks(rank, world, local_rank, _device(local_rank))


def slurm_job() -> str | None:
    """The job that this process belongs to, as SLURM's commands name it: "123", "123_4" in an array, None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _tasks_of_step() -> int:
    """How many processes srun started; 0 outside a step.

    The batch script carries SLURM_PROCID, too, but no step's number. SLURM_NTASKS would be wrong: the shell of an
    interactive step, and a batch script submitted from inside a step, hold a step's number beside the whole job's tasks.
    """
    if not {"SLURM_STEP_ID", "SLURM_PROCID"} <= os.environ.keys():
        return 0
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"])


def _check(rank: int, world: int, local_rank: int, tasks: int) -> None:
    alone_in_task = tasks > 1 and os.environ.get("SLURM_TASK_PID") == str(os.getpid())  # nobody between srun and this process
    if alone_in_task and (rank, world) != (int(os.environ["SLURM_PROCID"]), tasks):
        raise UserError(
            f"srun started this as task {os.environ['SLURM_PROCID']} of {tasks}, but RANK is {rank} and WORLD_SIZE {world}, "
            f"left by another launcher: unset {', '.join(RANK_VARIABLES)}"
        )
    address, nodes = os.environ.get("MASTER_ADDR"), int(os.environ.get("SLURM_STEP_NUM_NODES") or 1)
    if nodes > 1 and address in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"MASTER_ADDR is {address} in a step on {nodes} nodes, each of which would wait for itself: unset it")
    if not 0 <= rank < world or not 0 <= local_rank < world:
        raise UserError(
            f"RANK {rank} and LOCAL_RANK {local_rank} do not fit WORLD_SIZE {world}: unset all three, or let one launcher set them"
        )
    if world < tasks:
        raise UserError(
            f"srun started {tasks} tasks, but WORLD_SIZE is {world}, left by another launcher: unset {', '.join(RANK_VARIABLES)}, "
            "or start one task per node under torchrun"
        )
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("MASTER_ADDR and MASTER_PORT are not set: start several ranks with deepspeed, torchrun, srun or mstkd submit")


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"{name}={os.environ[name]!r} is not a number: unset it") from None


def _first_host() -> str:
    """The first host of the step, where srun puts rank 0."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    class Step(SlurmJobEnvironment):
        _env = {**SlurmJobEnvironment._env, "nodes": "SLURM_STEP_NODELIST"}

    return Step().hostnames[0]


def _port() -> int:
    """From the job's and the step's number: jobs that start at once on one host must not meet."""
    number = 16 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"]) % 16
    return PORTS[number % len(PORTS)]


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU (this node shows {torch.cuda.device_count()}); start one rank per GPU")
    return torch.device("cuda", local_rank)
