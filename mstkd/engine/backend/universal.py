"""A role's checkpoint in DeepSpeed's universal form, which any number of ranks can load.

DeepSpeed cuts weights and optimiser state of ZeRO 1-3 by the ranks that save. The universal form holds them whole, one
folder per parameter. It leaves out what no optimiser trains: buffers, which are loaded from the copy of the model's file.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from mstkd.engine.backend.library import silenced


def convert(source: Path, target: Path) -> None:
    """Write the universal form of the role folder `source` as the folder `target`, whose parent exists. On one rank."""
    from deepspeed.checkpoint.ds_to_universal import main

    with TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
        # In this process: its worker processes would be forks of one that has threads and a process group.
        words = argparse.Namespace(
            input_folder=str(_with_moments(source, Path(scratch))), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )  # fmt: skip
        with silenced():
            main(words)


def _with_moments(source: Path, scratch: Path) -> Path:
    """`source`, or a copy in `scratch` if its role has never been updated under ZeRO-3, with the moments that Adam then starts from.

    ZeRO-3 makes them in the first update, and the conversion asks for them.
    """
    for path in sorted(source.glob("*_optim_states.pt")):
        saved = torch.load(path, map_location="cpu", weights_only=False)
        sharded = saved["optimizer_state_dict"]
        if "fp32_flat_groups" not in sharded or sharded["optimizer_state_dict"]["state"]:
            return source
        sharded["optimizer_state_dict"]["state"] = {
            index: {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.zeros_like(weights)}
            for index, weights in enumerate(sharded["fp32_flat_groups"])
        }
        torch.save(saved, scratch / path.name)
    for path in source.glob("*_model_states.pt"):
        shutil.copy(path, scratch)
    return scratch


def load_own(engine, folder: Path, role: str) -> tuple[str | None, dict]:
    """Load `folder`/<role>, as so many ranks saved it, into a DeepSpeed engine; its path, None if it is not there, and what was saved with it.

    Collective.
    """
    return engine.load_checkpoint(str(folder), tag=role, load_lr_scheduler_states=False)


def load_universal(engine, folder: Path, role: str) -> tuple[str | None, dict]:
    """As `load_own`, from the universal form. Collective."""
    engine._config.load_universal_checkpoint = True
    try:
        with silenced():  # "MPU is not provided"
            path, state = load_own(engine, folder, role)
    finally:
        engine._config.load_universal_checkpoint = False
    if path is not None:
        _load_buffers(engine.module, Path(path))
        _own_step_counters(engine.optimizer.optimizer)
    return path, state


def _load_buffers(module: nn.Module, model_states: Path) -> None:
    saved = torch.load(model_states, map_location="cpu", mmap=True, weights_only=False)
    own = dict(module.named_buffers())
    for name in saved["buffer_names"]:
        own[name].copy_(saved["module"][name])


def _own_step_counters(optimizer: torch.optim.Optimizer) -> None:
    """A counter for each group of parameters, where its kernel looks for it.

    ZeRO-3 lets all its groups share one, which each of them would then advance; the conversion leaves it in host memory,
    and a fused Adam reads it on the parameters' device.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, torch.Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device if group.get("fused") else "cpu", copy=True)
