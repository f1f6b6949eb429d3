"""Joining and leaving the process group of the ranks."""

import os
from datetime import timedelta

import torch

from mstkd.config import WatchdogConfig
from mstkd.engine.backend.compiled_ops import load_op
from mstkd.engine.backend.library import deepspeed
from mstkd.engine.distributed import close_host_group, open_host_group
from mstkd.engine.environment import Ranks
from mstkd.engine.host_memory import keep_freed_memory
from mstkd.engine.jit_cache import JitCache, place_caches


def start(ranks: Ranks, watchdog: WatchdogConfig = WatchdogConfig()) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs). Collective.

    Raises UserError where DeepSpeed's collectives for CPU ranks do not compile.
    """
    cache = place_caches()
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
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
    if builder is not None and builder.is_compatible():
        load_op(builder, cache, "DeepSpeed's collectives for CPU ranks do", "")


def shutdown() -> None:
    if torch.distributed.is_initialized():
        close_host_group()
        torch.distributed.destroy_process_group()
