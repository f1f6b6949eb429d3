"""What one recipe costs, alone in its process: `python -m mstkd.bench.cost_program JOB`, JSON in and out."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from mstkd import methods
from mstkd.batch import Progress
from mstkd.bench.step_program import SCHEME, SEQUENCES, make_batch
from mstkd.config import RunConfig, load_config
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.engine.figures import resident_bytes
from mstkd.engine.frozen import frozen
from mstkd.evaluate.inference import evaluation_mode
from mstkd.methods import DataFacts, Method
from mstkd.models.recompute import recompute
from mstkd.precision import autocast
from mstkd.subsets import parse_subset

WARM_UP = 2  # iterations before those that are timed


@dataclass(frozen=True)
class Job:
    """What one process measures: the last stage of `recipe`, batch 1, given the sequences of `subset`."""

    recipe: str
    overrides: tuple[str, ...] = ()
    subset: str = "+".join(SEQUENCES)
    iterations: int = 30

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measure(job: Job) -> dict:
    """Seconds of each training and each test iteration, peak bytes of both together, and numbers of parameters.

    A test iteration is one window of the training crop. Peak bytes as in `mstkd bench step`. Raises UserError where the recipe cannot be built.
    """
    config, ranks = load_config(job.recipe, list(job.overrides)), resolve_environment()
    backend.start(ranks)
    synchronise = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    before = 0 if ranks.device.type == "cuda" else resident_bytes("VmRSS")
    torch.manual_seed(0)
    method = methods.build(config.method, DataFacts(SEQUENCES, SCHEME, config.data.crop), config.origin)
    for network in method.networks.values():
        network.to(ranks.device)
        if config.train.recompute:
            recompute(network, method.blocks)
    batch = make_batch(config.data.crop).to(ranks.device)
    batch.available[:] = torch.tensor(parse_subset(job.subset, SEQUENCES))
    network = method.scored[0]
    found = {"parameters": _count(method.networks[network])}

    def test() -> None:
        with evaluation_mode(method), autocast(ranks.device, config.train.precision):
            method.predict(batch.visible(), batch.available, network)

    step, trained = _training(config, method, batch, ranks)
    found |= {"trained": trained, "test": _seconds(test, job.iterations, synchronise), "train": _seconds(step, job.iterations, synchronise)}
    peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else resident_bytes("VmHWM")
    return found | {"peak": peak - before, "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"}


def _training(config: RunConfig, method: Method, batch, ranks) -> tuple[Callable[[], None], int]:
    """One training step of the last stage with every role that is due, and how many parameters it trains."""
    train = config.train.model_copy(update={"global_batch": 1, "micro_batch": 1, "zero_stage": 0})
    roles = method.roles(method.stages[-1])
    trained = sum(_count(role.step) for role in roles.values())
    engines = {name: RoleEngine(name, role, train, 1, ranks.device) for name, role in roles.items()}

    def step() -> None:
        carry = {}
        for engine in engines.values():
            with frozen([method.networks[name] for name in engine.role.borrows]):
                output = engine.forward(batch, carry, Progress(step=0, epoch=0, total_steps=100, total_epochs=1))
                engine.backward(output.loss)
            engine.step()
            carry |= output.carry

    return step, trained


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _seconds(call: Callable[[], None], iterations: int, synchronise: Callable[[], None]) -> list[float]:
    seconds = []
    for _ in range(WARM_UP + iterations):
        synchronise()
        began = time.perf_counter()
        call()
        synchronise()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    print(json.dumps(measure(Job(**{**values, "overrides": tuple(values["overrides"])}))), flush=True)
    os._exit(0)  # nobody waits for the ranks' farewells
