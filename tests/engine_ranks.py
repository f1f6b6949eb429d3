"""What the ranks do in test_engine.py: train the toy on generated batches."""

import functools
import resource
from pathlib import Path

import torch

from mstkd import methods
from mstkd.batch import Batch
from mstkd.config import OptimizerConfig, RoleConfig, RunConfig
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.checkpoint import Checkpoints
from mstkd.engine.distributed import on_main
from mstkd.engine.environment import resolve_environment
from mstkd.engine.heartbeat import Heartbeat
from mstkd.engine.stage import Stage
from mstkd.engine.stop import StopFlag, Stopped
from mstkd.engine.trainer import Trainer
from mstkd.errors import FailedElsewhereError, TrainingError, UserError
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.track import NullTracker

SEQUENCES = ("flair", "t1", "t1ce", "t2")


class Recorder(NullTracker):
    def __init__(self):
        self.rows, self.artifacts = [], []

    def log_artifact(self, path, folder):
        self.artifacts.append((str(path), folder))

    def log_metrics(self, values, step, stage):
        self.rows.append((step, values))


def micro_batch(step: int, j: int) -> Batch:
    """The j-th micro-batch of a step: the same whatever the rank count; every micro-batch lacks other sequences."""
    draw = torch.Generator().manual_seed(1000 * step + j)
    image = torch.randn(1, 4, 8, 8, 8, generator=draw)
    available = torch.tensor([[bool((j + 1) >> m & 1) or m == step % 4 for m in range(4)]])
    label = (image.mean(1) > 0.2).to(torch.uint8)
    return Batch(image, torch.ones(1, 8, 8, 8, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool), available, [f"s{j}"], label)


def toy_config(method: dict | None, optimizer: str | None, checkpoint: dict, train: dict) -> RunConfig:
    config = RunConfig.model_validate({
        "name": "toy", "method": {"name": "toys.co_trained", **(method or {})}, "data": {"shards": "none", "crop": [8, 8, 8]},
        "train": {"global_batch": 4, "log_every": 1, **train}, "validate": {"every_steps": 5}, "checkpoint": checkpoint,
    })  # fmt: skip
    if optimizer:
        config.train.roles["networks"] = RoleConfig(optimizer=OptimizerConfig(name=optimizer, lr=0.1))
    return config


class Batches:
    """As the training loader from step `start` on: counts the bad samples that this rank had to skip."""

    def __init__(self, steps, ranks, stop, stop_after, no_data, bad, no_room, start):
        self.steps, self.ranks, self.stop, self.stop_after, self.no_data, self.bad = steps, ranks, stop, stop_after, no_data, bad
        self.no_room, self.start, self.bad_samples = no_room, start, 0

    def __iter__(self):
        ranks = self.ranks
        mine = [a * ranks.world + ranks.rank for a in range(4 // ranks.world)]
        for step in range(self.start, self.steps):
            if step == self.stop_after and ranks.main:  # one rank alone is told; all must stop
                self.stop.reason = "SIGTERM"
            if self.no_data == [step, ranks.rank]:
                raise UserError(f"no data on rank {ranks.rank}")
            self.bad_samples += [step, ranks.rank] in self.bad
            room = self.no_room["bytes"] if [step, ranks.rank] in self.no_room["at"] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            yield [(j, micro_batch(step, j)) for j in mine]


ROOM = {"at": [], "bytes": 0}


def _limit_files(no_room: dict, due: bool) -> None:
    if due:
        resource.setrlimit(resource.RLIMIT_FSIZE, (no_room["bytes"], resource.RLIM_INFINITY))


def train(folder=None, steps=10, stop_after=None, zero=1, precision="fp32", method=None, best=False, keep=2, every_steps=1000, max_skipped=5,
          clipping=0.0, optimizer=None, stop_in_validation_at=None, no_data=None, bad=(), max_bad_samples=10, no_room=ROOM,
          profile=None, log_every=1, more=None, **checkpoint):  # fmt: skip
    """Train the toy; returns the log rows, final weights and state. `no_data`: (step, rank) whose loader fails there;
    `bad`: list of (step, rank) whose loader skips a bad sample there; `no_room`: `at` these (step, rank), `in_validation` likewise, and
    `at_resume` on these ranks, no file of the rank may become longer than so many bytes: a real error of the system. `more`: further keys of the
    train section. Other words are `checkpoint` keys."""
    ranks = resolve_environment()
    backend.start(ranks)
    updates = {"steps": steps, "zero_stage": zero, "precision": precision, "max_skipped": max_skipped, "gradient_clipping": clipping, **(more or {})}
    config = toy_config(method, optimizer, {"keep": keep, "every_steps": every_steps, **checkpoint}, updates)
    config.data.max_bad_samples, config.train.log_every, config.profile.steps, config.runs_dir = max_bad_samples, log_every, profile, str(folder)
    facts = methods.DataFacts(SEQUENCES, LABEL_SCHEMES["brats2018"], (8, 8, 8))

    def build():
        torch.manual_seed(0)
        return methods.build(config.method, facts)

    toy, accumulation = build(), 4 // ranks.world
    engines = {n: RoleEngine(n, r, config.train, accumulation, ranks.device) for n, r in toy.roles("distill").items()}
    stop = StopFlag()

    def validate(whole, stopping):
        if trainer.state.step == stop_in_validation_at and not ranks.main:
            stop.reason = "SIGUSR2"
        _limit_files(no_room, [trainer.state.step, ranks.rank] in no_room.get("in_validation", []))
        if stopping():
            raise Stopped
        return {"score": float(torch.sigmoid(sum(p.double().sum() for p in whole.networks["student"].parameters()))) if best else 0.0}

    batches = functools.partial(Batches, steps, ranks, stop, stop_after, no_data, bad, no_room)
    stage = Stage("distill", config, toy, engines, steps, 8, batches, validate, build)
    heartbeat = Heartbeat(Path(folder), ranks, 0, config.watchdog)
    trainer = Trainer(stage, ranks, Checkpoints(Path(folder), ranks, config.checkpoint), Recorder(), stop, heartbeat)
    _limit_files(no_room, ranks.rank in no_room.get("at_resume", []))
    try:
        if resumed := on_main(trainer.checkpoints.newest_sound, ranks):
            trainer.resume(*resumed)
        finished = trainer.fit()
    except (FailedElsewhereError, TrainingError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    whole = trainer.keeper.whole.method()
    weights = {name: {k: v.numpy().copy() for k, v in net.state_dict().items()} for name, net in whole.networks.items()}
    counters = {name: (engine._engine.global_steps, engine._engine.skipped_steps) for name, engine in engines.items()}
    for engine in engines.values():
        engine.destroy()
    return {"rows": trainer.tracker.rows, "artifacts": trainer.tracker.artifacts, "weights": weights, "finished": finished,
            "state": vars(trainer.state), "step": trainer.state.step, "skipped": trainer.state.skipped_updates, "counters": counters}  # fmt: skip
