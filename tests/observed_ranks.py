"""What the ranks do in test_observability.py: train the toy while every wait for the device and every collective is counted."""

import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

import mstkd.engine

SOURCES = str(Path(mstkd.engine.__file__).parents[1])
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


def counted(folder: str, steps: int, log_every: int) -> dict:
    """Where the project's own code reads a tensor's value, and how often it reduces, over all updates."""
    from engine_ranks import train

    reads, reductions = Counter(), Counter()
    originals = {name: getattr(torch.Tensor, name) for name in READS}
    all_reduce = dist.all_reduce

    def counting(name, original):
        def read(tensor, *args, **kwargs):
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(SOURCES):
                reads[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1
            return original(tensor, *args, **kwargs)

        return read

    def reduced(*args, **kwargs):
        caller = sys._getframe(1).f_code
        reductions[f"{Path(caller.co_filename).stem}.{caller.co_name}"] += 1
        return all_reduce(*args, **kwargs)

    for name, original in originals.items():
        setattr(torch.Tensor, name, counting(name, original))
    dist.all_reduce = reduced
    try:
        train(folder, steps=steps, log_every=log_every, zero=1)
    finally:
        dist.all_reduce = all_reduce
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
    return {"reads": dict(reads), "reductions": dict(reductions)}
