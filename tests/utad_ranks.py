"""What the ranks do in test_utad_training.py: updates of a stage through the engine, on slices that are the same for any number of ranks."""

import torch
from small_utad import SIZES, make, make_batch

from mstkd.config import RunConfig
from mstkd.engine import backend
from mstkd.engine.averages import Averages
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.engine.frozen import freeze
from mstkd.engine.meter import Meter
from mstkd.engine.stage import Stage
from mstkd.engine.update import Update
from mstkd.errors import UserError

MICRO_BATCHES = 2  # of two slices each


def train(stage: str, name: str = "utad_net", count: int = 5, train: dict | None = None, **section) -> dict | str:
    """Weights before and after `count` updates of a stage, figures, and how often each role was updated; or what was refused."""
    ranks = resolve_environment()
    backend.start(ranks)
    config = RunConfig.model_validate({
        "name": "small", "method": {"name": name}, "data": {"shards": "none", "slices": {"size": SIZES[name]}},
        "train": {"global_batch": 2 * MICRO_BATCHES, "micro_batch": 2, "steps": count, "precision": "fp32", **(train or {})},
    })  # fmt: skip
    method = make(name, **section)
    roles = method.roles(stage)
    method.begin(stage)
    for network in method.needs(stage):
        freeze(method.networks[network], network, roles)
    before = weights(method)
    try:
        engines = {role: RoleEngine(role, parts, config.train, MICRO_BATCHES // ranks.world, ranks.device) for role, parts in roles.items()}
    except UserError as error:
        return str(error)
    ready = Stage(stage, config, method, engines, count, 8, batches=None, validate=None, plain_copy=None)
    update, meter = Update(ready, ranks, {role: Averages(engine, method.networks, ranks) for role, engine in engines.items()}), Meter(ranks)
    applied = []
    for step in range(count):
        mine = [(j, make_batch(size=SIZES[name], seed=10 * step + j)) for j in range(ranks.rank, MICRO_BATCHES, ranks.world)]
        applied.append(update(mine, ready.progress(step), meter))
    figures = meter.flush(4)
    found = {
        "before": before, "figures": figures, "skipped": applied.count(False),
        "updates": {role: engine._engine.global_steps for role, engine in engines.items()},
    }  # fmt: skip
    with engines["generator"].whole_weights():
        found["after"] = weights(method)
    for engine in engines.values():
        engine.destroy()
    return found


def weights(method) -> dict[str, dict]:
    return {name: {key: value.numpy().copy() for key, value in network.state_dict().items()} for name, network in method.networks.items()}
