"""One contender of `mstkd bench step`, alone in its process: `python -m mstkd.bench.step_program JOB`, JSON in and out.

A fresh process per contender and round, so that its peak memory is its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mstkd import methods
from mstkd.batch import Batch, Progress
from mstkd.bench.reference_step import ReferenceStep
from mstkd.config import TrainConfig
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import Ranks, resolve_environment
from mstkd.engine.figures import resident_bytes
from mstkd.engine.frozen import frozen
from mstkd.methods import DataFacts, Method
from mstkd.models.recompute import recompute
from mstkd.shards.spec import LABEL_SCHEMES

SEQUENCES, SCHEME = ("flair", "t1", "t1ce", "t2"), LABEL_SCHEMES["brats2018"]
STILL = {"dropout": 0.0, "fuse_dropout": 0.0}  # so that the losses of two contenders can be compared
REFERENCE, OURS = "reference", "ours"
Step = Callable[[], dict[str, Tensor]]  # one training step; the loss terms, unweighted


@dataclass(frozen=True)
class Job:
    """What one process measures. `store`: a file through which several ranks meet."""

    kind: str  # REFERENCE or OURS
    crop: tuple[int, int, int]
    network: dict  # sizes that differ from the published network
    precision: str = "fp32"
    zero_stage: int = 0  # nothing to share out on one rank
    recompute: bool = False
    steps: int = 1  # timed ones, after one to warm up
    store: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measure(job: Job) -> dict:
    """Of this rank: seconds of each step, peak bytes, the terms of the first step, and the rate of a matrix product. Collective.

    Peak bytes: on a GPU those that PyTorch had allocated at most; on a CPU the most that was resident less what was
    once everything was imported. So weights, gradients and the optimiser's state count, libraries do not.
    """
    ranks = resolve_environment() if job.kind == REFERENCE else _join(job)  # plain PyTorch gets nothing that our start does
    synchronise = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    before = 0 if ranks.device.type == "cuda" else resident_bytes("VmRSS")
    step = (_reference if job.kind == REFERENCE else _ours)(job, ranks)
    terms = {name: value.item() for name, value in step().items()}
    seconds = []
    for _ in range(job.steps):
        synchronise()
        began = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else resident_bytes("VmHWM")
    found = {"seconds": seconds, "peak": peak - before, "terms": terms, "matmul": _matmul_rate(job.precision, ranks.device, synchronise)}
    return {**found, "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"}


def make_batch(crop: tuple[int, int, int], rank: int = 0) -> Batch:
    """One sample, half of its sequences hidden, with every label in it."""
    generator = torch.Generator().manual_seed(rank)
    label = torch.tensor(SCHEME.values, dtype=torch.uint8)[torch.randint(len(SCHEME.values), (1, *crop), generator=generator)]
    available = torch.tensor([[True, False, True, False]])
    image = torch.rand(1, 4, *crop, generator=generator)
    return Batch(image, torch.ones(1, *crop, dtype=torch.bool), torch.ones_like(available), available, ["bench"], label)


def build_method(job: Job) -> Method:
    """MST-KDNet without dropout; the same weights in every process."""
    torch.manual_seed(0)
    return methods.build({"name": "mst_kdnet", "network": {**job.network, **STILL}}, DataFacts(SEQUENCES, SCHEME, job.crop))


def _join(job: Job) -> Ranks:
    ranks = resolve_environment()
    if job.store:
        backend_name = "nccl" if ranks.device.type == "cuda" else "gloo"
        store = torch.distributed.FileStore(job.store, ranks.world)
        torch.distributed.init_process_group(backend_name, store=store, rank=ranks.rank, world_size=ranks.world)
    backend.start(ranks)
    return ranks


def _reference(job: Job, ranks: Ranks) -> Step:
    method, batch = build_method(job), make_batch(job.crop).to(ranks.device)
    sizes = method.config.network.model_dump(exclude={"norm", "bn_eval", "last_stride"})
    reference = ReferenceStep(job.crop, sizes, ranks.device)
    for name, network in method.networks.items():
        getattr(reference, name).load_state_dict(network.state_dict())
    return lambda: reference(batch.image, batch.available, batch.label)


def _ours(job: Job, ranks: Ranks) -> Step:
    method, batch = build_method(job), make_batch(job.crop, ranks.rank).to(ranks.device)
    train = TrainConfig(global_batch=ranks.world, steps=100, precision=job.precision, zero_stage=job.zero_stage)
    for network in method.networks.values():
        network.to(ranks.device)
        if job.recompute:
            recompute(network, method.blocks)
    engines = {name: RoleEngine(name, role, train, 1, ranks.device) for name, role in method.roles("distill").items()}
    progress = Progress(step=0, epoch=0, total_steps=100, total_epochs=1)

    def step() -> dict[str, Tensor]:
        carry, terms = {}, {}
        for engine in engines.values():
            with frozen([method.networks[name] for name in engine.role.borrows]):
                output = engine.forward(batch, carry, progress)
                engine.backward(output.loss)
            engine.step()
            carry |= output.carry
            terms |= output.scalars
        return terms

    return step


def _matmul_rate(precision: str, device: torch.device, synchronise: Callable[[], None]) -> float:
    """Floating-point operations per second of a large matrix product: what the device gives at best in this type."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        synchronise()
        began = time.perf_counter()
        a @ a
        synchronise()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    print(json.dumps(measure(Job(**{**values, "crop": tuple(values["crop"])}))), flush=True)
    os._exit(0)  # nobody waits for the ranks' farewells
