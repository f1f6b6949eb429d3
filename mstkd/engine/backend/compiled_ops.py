"""Operators of DeepSpeed that are compiled on first use: by one rank per node, before any other can wait for it."""

import subprocess
from collections.abc import Iterable

import torch

from mstkd.engine.backend.library import deepspeed
from mstkd.engine.backend.settings import RoleSettings
from mstkd.engine.environment import Ranks
from mstkd.engine.jit_cache import JitCache, one_builder, place_caches
from mstkd.errors import UserError


def load_op(builder, cache: JitCache, what: str, otherwise: str) -> None:
    """Compile and load an operator; DeepSpeed then finds it loaded.

    Raises UserError where it does not compile: "`what` not compile (...); install ...`otherwise`".
    """
    try:
        with one_builder(cache, builder.name):
            builder.load()
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"{cache.folder}: {what} not compile ({_reason(error)}); "
            f"install g++, ninja and the headers of Python on every node, see mstkd doctor{otherwise}"
        ) from error


def load_ops(settings: Iterable[RoleSettings], compiled: bool, ranks: Ranks) -> None:
    """What the roles and `train.compile` (`compiled`) need of a compiler, tried before training. Raises UserError."""
    if any(role.offload.optimizer and role.optimizer.name != "sgd" for role in settings):
        _load_cpu_adam()
    if compiled and ranks.local_rank == 0:
        _try_compile(ranks.device)


def _load_cpu_adam() -> None:
    deepspeed()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    load_op(builder, place_caches(), "DeepSpeed's operator cpu_adam does", "; or set train.offload.optimizer=false")


def _try_compile(device: torch.device) -> None:
    """torch.compile on something small."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # the compilers' and torch's own
        reason = _reason(error.__cause__ or error)
        raise UserError(f"train.compile: torch.compile does not work here ({reason}); install g++ (or set CXX), or set train.compile=false") from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line or "not found" in line), lines[0]).strip()[:200]
