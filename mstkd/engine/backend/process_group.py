"""Joining and leaving the process group of the ranks."""

import os
import subprocess
from datetime import timedelta

import torch

from mstkd.config import WatchdogConfig
from mstkd.engine.backend.library import deepspeed
from mstkd.engine.distributed import close_host_group, open_host_group
from mstkd.engine.environment import Ranks
from mstkd.engine.jit_cache import JitCache, one_builder, place_caches
from mstkd.errors import UserError


def start(ranks: Ranks, watchdog: WatchdogConfig = WatchdogConfig()) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs). Collective.

    Raises UserError where DeepSpeed's collectives for CPU ranks do not compile.
    """
    cache = place_caches()
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _compile_collectives(cache)
    else:
        torch.cuda.set_device(ranks.device)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if ranks.world == 1 and not torch.distributed.is_initialized():  # alone: no port that another process could take first
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    timeout = timedelta(minutes=watchdog.collective_min)  # rank 0 may hash or copy for longer than DeepSpeed's 10 minutes
    deepspeed().init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    open_host_group(timeout)


def _compile_collectives(cache: JitCache) -> None:
    """DeepSpeed's shared-memory collectives: compiled by one rank per node here; init_distributed then finds them loaded."""
    deepspeed()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    try:
        with one_builder(cache, builder.name):
            builder.load()
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0])[:200]
        raise UserError(
            f"{cache.folder}: DeepSpeed's collectives for CPU ranks do not compile ({reason}); "
            "install g++, ninja and the headers of Python on every node, see mstkd doctor"
        ) from error


def shutdown() -> None:
    if torch.distributed.is_initialized():
        close_host_group()
        torch.distributed.destroy_process_group()
