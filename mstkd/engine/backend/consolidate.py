"""Whole weights out of a role's checkpoint, without a process group or a GPU."""

from pathlib import Path

import torch
from torch import Tensor

from mstkd.engine.backend.library import deepspeed, silenced


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The fp32 parameters and the buffers in a role's folder, by their names in the RoleStep, whatever its ZeRO stage and ranks."""
    if not any(folder.glob("*_optim_states.pt")):  # without ZeRO rank 0 writes all of it into one file
        return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with silenced():
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
