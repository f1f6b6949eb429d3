"""What the ranks do in test_uhf_training.py: updates of a stage through the engine, on volumes that are the same for any number of ranks."""

from small_uhf import CROP, START, make, make_batch

from mstkd.config import RunConfig, TeacherConfig
from mstkd.engine import backend
from mstkd.engine.averages import Averages
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.engine.frozen import freeze
from mstkd.engine.meter import Meter
from mstkd.engine.stage import Stage
from mstkd.engine.teacher import FrozenNetworks
from mstkd.engine.update import Update

MICRO_BATCHES = 2  # of one volume each


def train(stage: str, count: int = 2, **train) -> dict:
    """Weights before and after `count` updates of a stage, figures, and the frozen networks' gradients that there should not be."""
    ranks = resolve_environment()
    backend.start(ranks)
    config = RunConfig.model_validate({
        "name": "small", "method": {"name": "uhf_guided"}, "data": {"shards": "none", "crop": CROP},
        "train": {"global_batch": MICRO_BATCHES, "steps": count, "precision": "fp32", **train},
    })  # fmt: skip
    method = make()
    roles = method.roles(stage)
    method.begin(stage)
    for network in method.needs(stage):
        freeze(method.networks[network], network, roles)
    before = weights(method)
    engines = {role: RoleEngine(role, parts, config.train, MICRO_BATCHES // ranks.world, ranks.device) for role, parts in roles.items()}
    ready = Stage(stage, config, method, engines, count, 8, batches=None, validate=None, plain_copy=None)
    update, meter = Update(ready, ranks, {role: Averages(engine, method.networks, ranks) for role, engine in engines.items()}), Meter(ranks)
    applied = []
    for step in range(count):
        applied.append(update([(j, make_batch(seed=10 * step + j)) for j in range(ranks.rank, MICRO_BATCHES, ranks.world)], ready.progress(step), meter))
    found = {
        "before": before, "after": weights(method), "figures": meter.flush(count), "skipped": applied.count(False),
        "gradients": [key for network in method.needs(stage) for key, p in method.networks[network].named_parameters() if p.grad is not None],
    }  # fmt: skip
    for engine in engines.values():
        engine.destroy()
    return found


def weights(method) -> dict[str, dict]:
    return {name: {key: value.numpy().copy() for key, value in network.state_dict().items()} for name, network in method.networks.items()}


def keeper_gradients(placement: str) -> tuple[float, list]:
    """Loss and gradients of the keeper, which flow through the frozen teacher's decoder, where the teacher lies as `placement` says."""
    ranks = resolve_environment()
    backend.start(ranks)
    method = make(network={"width": 8, "keeper_width": 1, "critic_width": 2})
    roles = method.roles("keeper")
    frozen = FrozenNetworks({"teacher": method.networks["teacher"]}, roles, TeacherConfig(placement=placement), ranks)
    output = roles["keeper"].step(make_batch(), {}, START)
    output.loss.backward()
    gradients = [p.grad.numpy().copy() for p in method.networks["keeper"].parameters() if p.ndim > 1]
    frozen.destroy()
    return float(output.loss.detach()), gradients
