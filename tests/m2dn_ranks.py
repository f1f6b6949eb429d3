"""What the ranks do in test_m2dn.py: updates through the engine, on slices that are the same for any number of ranks."""

import torch
from small_m2dn import SIZE, make, make_batch

from mstkd.config import RunConfig
from mstkd.engine import backend
from mstkd.engine.averages import Averages
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.engine.meter import Meter
from mstkd.engine.stage import Stage
from mstkd.engine.update import Update

MICRO_BATCHES = 2  # of two slices each


def train(name: str = "m2dn", count: int = 4, train: dict | None = None, **section) -> dict:
    """Weights before and after `count` updates, figures, and how many updates were skipped."""
    ranks = resolve_environment()
    backend.start(ranks)
    config = RunConfig.model_validate({
        "name": "small", "method": {"name": name}, "data": {"shards": "none", "slices": {"size": SIZE}},
        "train": {"global_batch": 2 * MICRO_BATCHES, "micro_batch": 2, "steps": count, "precision": "fp32", "gradient_clipping": 1.0, **(train or {})},
    })  # fmt: skip
    method = make(name, **section)
    before = weights(method)
    engines = {role: RoleEngine(role, parts, config.train, MICRO_BATCHES // ranks.world, ranks.device) for role, parts in method.roles("train").items()}
    stage = Stage("train", config, method, engines, count, 8, batches=None, validate=None, plain_copy=None)
    update, meter = Update(stage, ranks, {role: Averages(engine, method.networks, ranks) for role, engine in engines.items()}), Meter(ranks)
    applied = []
    for step in range(count):
        applied.append(update([(j, make_batch(seed=10 * step + j)) for j in range(ranks.rank, MICRO_BATCHES, ranks.world)], stage.progress(step), meter))
    found = {"before": before, "figures": meter.flush(count), "skipped": applied.count(False)}
    for engine in engines.values():
        with engine.whole_weights():
            found["after"] = weights(method)
        engine.destroy()
    return found


def weights(method) -> dict[str, dict]:
    return {name: {key: value.numpy().copy() for key, value in network.state_dict().items()} for name, network in method.networks.items()}
