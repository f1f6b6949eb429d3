"""The composition root: from a recipe to trained networks.

Entry of `mstkd train RECIPE`, `deepspeed --num_gpus N --module mstkd.train RECIPE [key=value ...]` and torchrun.
"""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mstkd import methods, run_folder
from mstkd.config import RunConfig, load_config
from mstkd.console import log_to_console
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader, check_batching
from mstkd.data.training import TrainingSet, open_training
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine, role_settings
from mstkd.engine.checkpoint import Checkpoints
from mstkd.engine.distributed import Ranks, agreed, on_main, resolve_environment
from mstkd.engine.stop import StopFlag, stop_signals
from mstkd.engine.trainer import Stage, Trainer
from mstkd.engine.warm_start import warm_start
from mstkd.errors import FailedElsewhereError, TrainingError, UserError
from mstkd.evaluate.overlap import refuse_overlap
from mstkd.evaluate.validation import Validation
from mstkd.evaluate.weights import load_network, safetensors_of
from mstkd.methods import DataFacts, Method, Role
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
    methods.read_config(config.method, config.origin)
    backend.start(ranks)
    with agreed(ranks):
        run = prepare(config, ranks)
    on_main(lambda: refuse_overlap(run.training.stores, config.data), ranks)
    on_main(lambda: run_folder.open_run(run.config), ranks)
    with logged_to_file(config.run_dir, ranks), stop_signals() as stop, _trackers(run, ranks) as tracker:
        for name in run.stages:
            if not _train_stage(name, run, tracker, stop):
                tracker.finish("KILLED")
                return stop.reason or "SIGTERM"
    return None


@dataclass
class Run:
    """A run whose every setting has been checked, before anything is written."""

    config: RunConfig  # with its `method:` section resolved
    method: Method
    training: TrainingSet
    stages: dict[str, dict[str, Role]]  # to be trained, in order: the roles of each
    validation: Validation
    ranks: Ranks


def prepare(config: RunConfig, ranks: Ranks) -> Run:
    """Open the data and build the networks. Raises UserError for whatever in the configuration cannot work."""
    training = open_training(config.data, config.seed, complete_only=methods.load(config.method["name"]).complete_only)
    method, config = build_method(config, training)
    stages = {name: method.roles(name) for name in chosen_stages(config, method)}
    known = {role for name in method.stages for role in (stages.get(name) or method.roles(name))}
    if unknown := sorted(set(config.train.roles) - known):
        raise UserError(f"train.roles.{unknown[0]}: {config.method['name']} has no such role; its roles: {', '.join(sorted(known))}")
    for roles in stages.values():
        for name, role in roles.items():
            role_settings(name, role, config.train)
    if config.inference.window:
        method.check_crop(method.config, config.inference.window, "inference.window")
    if config.init_from:
        safetensors_of(Path(config.init_from))
    return Run(config, method, training, stages, Validation(config, training.stores, ranks), ranks)


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


def _train_stage(name: str, run: Run, tracker: Tracker, stop: StopFlag) -> bool:
    """Train one stage to its end; False if stopped before."""
    config, method, ranks, roles = run.config, run.method, run.ranks, run.stages[name]
    sharded = any(role_settings(role, roles[role], config.train).zero_stage for role in roles)
    checkpoints = Checkpoints(config.run_dir / name / "checkpoints", ranks, config.checkpoint.keep, sharded)
    resumed = on_main(checkpoints.newest_sound, ranks)
    if resumed and resumed[1].finished:
        log.info("stage %s: already finished at step %d", name, resumed[1].step)
        return True
    with agreed(ranks):
        for network, earlier in method.needs(name).items():
            load_network(config.run_dir, method, network, earlier)
        if config.init_from and name == method.stages[0] and not resumed:
            warm_start(method, safetensors_of(Path(config.init_from)))
    for network in method.networks.values():
        network.to(ranks.device)
    accumulation = check_batching(config.train.global_batch, config.train.micro_batch, ranks.world)
    engines = {role: RoleEngine(role, roles[role], config.train, accumulation, ranks.device) for role in roles}
    trainer = Trainer(_stage(name, run, engines), ranks, checkpoints, tracker, stop)
    if resumed:
        trainer.resume(*resumed)
    trainer.tracker = tracker.child(name, start_step=trainer.state.step)
    try:
        finished = trainer.fit()
    finally:
        for engine in engines.values():
            engine.destroy()
    if finished:
        trainer.tracker.finish("FINISHED")
    return finished


def _stage(name: str, run: Run, engines: dict[str, RoleEngine]) -> Stage:
    config, training, ranks = run.config, run.training, run.ranks
    steps = total_steps(config, training.order.items_per_epoch)
    intensity = Intensity(run.method.intensity)

    def batches(start_step: int):
        return TrainLoader(
            training, config.data, intensity, global_batch=config.train.global_batch, micro_batch=config.train.micro_batch,
            total_steps=steps, start_step=start_step, rank=ranks.rank, world=ranks.world,
        )  # fmt: skip

    return Stage(
        name, config, run.method, engines, steps, training.order.items_per_epoch, batches, run.validation,
        lambda: build_method(config, training)[0],
    )  # fmt: skip


def _trackers(run: Run, ranks: Ranks) -> Tracker:
    if not ranks.main:
        return NullTracker()
    record = run_folder.record_attempt(run.config, ranks.world)
    tags = {"git": (record["git"] or {}).get("commit", "none"), "ranks": ranks.world, "task": run.method.task}
    dataset = {"name": "+".join(record["data"]["names"]), "digest": record["data"]["digest"]}
    return open_trackers(run.config, run.config.run_dir, attempt=len(record["attempts"]), tags=tags, dataset=dataset)


@contextmanager
def logged_to_file(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Everything this rank says goes to logs/rank-<n>.log of the run folder, too."""
    handler = logging.FileHandler(run_dir / "logs" / f"rank-{ranks.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("mstkd").setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException:  # here only: the console gets the one line of `run`, or Python's own traceback
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run ended here", (), sys.exc_info()))
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def run(recipe: str, overrides: list[str]) -> int:
    """Train a recipe and return the exit code: 0, 1 training failed, 2 bad input, 128 + signal when stopped."""
    ranks = None
    try:
        ranks = resolve_environment()
        config = load_config(recipe, overrides)
        log_to_console(ranks.rank)
        stopped_by = train(config)
        return 128 + signal.Signals[stopped_by] if stopped_by else 0
    except (UserError, TrainingError) as error:
        _say(error, ranks)
        return error.exit_code
    except FailedElsewhereError as error:
        return error.exit_code
    finally:
        backend.shutdown()


def _say(error: Exception, ranks: Ranks | None) -> None:
    """The line on stderr: from the one rank that fails, or once per node while the ranks cannot yet agree on one."""
    if ranks is None or ranks.main:
        print(f"error: {error}", file=sys.stderr)
    elif torch.distributed.is_initialized() or ranks.local_rank == 0:
        print(f"error (rank {ranks.rank}): {error}", file=sys.stderr)


def main() -> None:
    """`python -m mstkd.train RECIPE [key=value ...]`; the deepspeed launcher's --local_rank is not needed and dropped."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if not words or words[0].startswith("-"):
        print("usage: python -m mstkd.train RECIPE [key=value ...]", file=sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(words) else 2)
    sys.exit(run(words[0], words[1:]))


if __name__ == "__main__":
    main()
