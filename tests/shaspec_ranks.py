"""What the ranks do in test_shaspec.py: a few steps with other sequences on each rank."""

import torch
from small_shaspec import START, make, make_batch

from mstkd.config import TrainConfig
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment

SUBSETS = [(True, False, False, False), (False, False, True, True)]  # of the micro-batches: nothing in common


CROP = (64, 64, 32)  # smaller, the norm of the pyramid's context would see rounding alone


def steps(zero: int, count: int = 3, **train) -> list[dict[str, float]]:
    """The loss terms of this rank's micro-batches by step; the global batch is the same for one rank and for two."""
    ranks = resolve_environment()
    backend.start(ranks)
    method = make(crop=CROP, network={"width": 16})  # wide enough for weights that ZeRO-3 cuts (over 100,000 elements)
    role = method.roles("missing")["missing"]
    role.optimizer = role.optimizer.model_copy(update={"lr": 1e-3, "momentum": 0.9})
    accumulation = len(SUBSETS) // ranks.world
    config = TrainConfig(global_batch=len(SUBSETS), steps=count, zero_stage=zero, **{"precision": "fp32", **train})
    engine = RoleEngine("missing", role, config, accumulation, ranks.device)
    found = []
    for step in range(count):
        for j in range(ranks.rank, len(SUBSETS), ranks.world):
            output = engine.forward(make_batch(SUBSETS[j], crop=CROP, seed=10 * step + j), {}, START)
            engine.backward(output.loss)
            engine.step()
            found.append({"loss": output.loss.item()} | {name: value.item() for name, value in output.scalars.items()})
    engine.destroy()
    return found
