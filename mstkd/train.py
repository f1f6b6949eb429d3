"""The composition root: from a recipe to trained networks.

Entry of `mstkd train RECIPE`, `deepspeed --num_gpus N --module mstkd.train RECIPE [key=value ...]` and torchrun.
"""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mstkd import methods, run_folder
from mstkd.config import RunConfig, load_config
from mstkd.console import log_to_console
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader, check_batching
from mstkd.data.training import TrainingSet, open_training
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.checkpoint import Checkpoints
from mstkd.engine.distributed import Ranks, on_main, resolve_environment
from mstkd.engine.stop import StopFlag, stop_signals
from mstkd.engine.trainer import Stage, Trainer, TrainingError
from mstkd.engine.warm_start import warm_start
from mstkd.errors import UserError
from mstkd.evaluate.overlap import refuse_overlap
from mstkd.evaluate.validation import Validation
from mstkd.evaluate.weights import load_network, safetensors_of
from mstkd.methods import DataFacts, Method
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.track import NullTracker, Tracker, open_trackers

log = logging.getLogger(__name__)


def train(config: RunConfig) -> str | None:
    """Train every stage of a run, or continue it. Returns None, or the name of the signal that stopped it (all is saved).

    Collective: every rank calls it with the same configuration. Raises UserError on bad input, TrainingError when
    the loss stays non-finite.
    """
    ranks = resolve_environment()
    backend.check_precision(config.train.precision, ranks.device)
    check_batching(config.train.global_batch, config.train.micro_batch, ranks.world)
    backend.start(ranks)
    training = open_training(config.data, config.seed, complete_only=methods.load(config.method["name"]).complete_only)
    method, config = build_method(config, training)
    stages = chosen_stages(config, method)
    on_main(lambda: refuse_overlap(training.stores, config.data), ranks)
    on_main(lambda: run_folder.open_run(config), ranks)
    with logged_to_file(config.run_dir, ranks), stop_signals() as stop, _trackers(config, method, ranks) as tracker:
        for name in stages:
            if not _train_stage(name, config, method, training, ranks, tracker, stop):
                tracker.finish("KILLED")
                return stop.reason or "SIGTERM"
    return None


def build_method(config: RunConfig, training: TrainingSet) -> tuple[Method, RunConfig]:
    """The method with freshly initialised networks, and the configuration with its `method:` section resolved."""
    scheme = training.stores[0].index.label_scheme
    facts = DataFacts(training.sequences, LABEL_SCHEMES[scheme] if scheme else None, config.data.crop)
    torch.manual_seed(config.seed)  # the same initial weights on every rank and for every rank count
    method = methods.build(config.method, facts)
    section = {"name": config.method["name"], **method.config.model_dump(mode="json")}
    return method, config.model_copy(update={"method": section})


def chosen_stages(config: RunConfig, method: Method) -> list[str]:
    """The stages to train, in the method's order."""
    unknown = sorted(set(config.stages or ()) - set(method.stages))
    if unknown:
        raise UserError(f"stages: {unknown[0]!r} is no stage of {config.method['name']}; its stages: {', '.join(method.stages)}")
    return [name for name in method.stages if config.stages is None or name in config.stages]


def total_steps(config: RunConfig, items_per_epoch: int) -> int:
    """Steps of a stage: as given, or epochs rounded up to whole steps."""
    if config.train.steps is not None:
        return config.train.steps
    return -(-round(config.train.epochs * items_per_epoch) // config.train.global_batch)


def _train_stage(
    name: str, config: RunConfig, method: Method, training: TrainingSet, ranks: Ranks, tracker: Tracker, stop: StopFlag
) -> bool:
    """Train one stage to its end; False if stopped before."""
    folder = config.run_dir / name / "checkpoints"
    checkpoints = Checkpoints(folder, ranks, config.checkpoint.keep)
    for network, earlier in method.needs(name).items():
        load_network(config.run_dir, method, network, earlier)
    if config.init_from and name == method.stages[0] and not checkpoints.pointer("latest"):
        warm_start(method, safetensors_of(Path(config.init_from)))
    for network in method.networks.values():
        network.to(ranks.device)
    accumulation = check_batching(config.train.global_batch, config.train.micro_batch, ranks.world)
    roles = method.roles(name)
    unknown = sorted(set(config.train.roles) - set(roles))
    if unknown:
        raise UserError(f"train.roles.{unknown[0]}: stage {name} has no such role; its roles: {', '.join(roles)}")
    engines = {role: RoleEngine(role, roles[role], config.train, accumulation, ranks.device) for role in roles}
    steps = total_steps(config, training.order.items_per_epoch)
    intensity = Intensity(method.intensity)

    def batches(start_step: int):
        return TrainLoader(
            training, config.data, intensity, global_batch=config.train.global_batch, micro_batch=config.train.micro_batch,
            total_steps=steps, start_step=start_step, rank=ranks.rank, world=ranks.world,
        )  # fmt: skip

    stage = Stage(
        name, config, method, engines, steps, training.order.items_per_epoch, batches,
        Validation(config, training.stores, ranks), lambda: build_method(config, training)[0],
    )  # fmt: skip
    trainer = Trainer(stage, ranks, checkpoints, tracker, stop)
    trainer.resume(required=config.resume == "required")
    trainer.tracker = tracker.child(name, start_step=trainer.state.step)
    try:
        return trainer.fit()
    finally:
        for engine in engines.values():
            engine.destroy()


def _trackers(config: RunConfig, method: Method, ranks: Ranks) -> Tracker:
    if not ranks.main:
        return NullTracker()
    record = run_folder.record_attempt(config, ranks.world)
    tags = {"git": (record["git"] or {}).get("commit", "none"), "ranks": ranks.world, "task": method.task}
    dataset = {"name": "+".join(record["data"]["names"]), "digest": record["data"]["digest"]}
    return open_trackers(config, config.run_dir, attempt=len(record["attempts"]), tags=tags, dataset=dataset)


@contextmanager
def logged_to_file(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Everything this rank says goes to logs/rank-<n>.log of the run folder, too."""
    handler = logging.FileHandler(run_dir / "logs" / f"rank-{ranks.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("mstkd").setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException:
        log.exception("the run ended here")
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def run(recipe: str, overrides: list[str]) -> int:
    """Train a recipe and return the exit code: 0, 1 training failed, 2 bad input, 128 + signal when stopped."""
    rank = 0
    try:
        config = load_config(recipe, overrides)
        rank = resolve_environment().rank
        log_to_console(rank)
        stopped_by = train(config)
        return 128 + signal.Signals[stopped_by] if stopped_by else 0
    except (UserError, TrainingError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        backend.shutdown()


def main() -> None:
    """`python -m mstkd.train RECIPE [key=value ...]`; the deepspeed launcher's --local_rank is not needed and dropped."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if not words or words[0].startswith("-"):
        print("usage: python -m mstkd.train RECIPE [key=value ...]", file=sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(words) else 2)
    sys.exit(run(words[0], words[1:]))


if __name__ == "__main__":
    main()
