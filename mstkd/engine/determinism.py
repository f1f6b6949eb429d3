"""`train.deterministic`: the same bits in every run on the same machine."""

import os

import torch


def set_determinism(wanted: bool) -> None:
    """Let torch take deterministic implementations only, and stop where there is none. Call before CUDA starts."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a workspace of its own
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False  # it may choose another algorithm in each run
