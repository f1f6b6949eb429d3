"""The composition root: from a recipe to trained networks.

Entry of `mstkd train RECIPE`, `deepspeed --num_gpus N --module mstkd.train RECIPE [key=value ...]` and torchrun.
"""

import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from mstkd import attempts, methods, run_folder
from mstkd.config import DataConfig, RunConfig, load_config
from mstkd.console import log_to_console
from mstkd.data.availability import Availability
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader
from mstkd.data.slices import SliceIndex
from mstkd.data.training import TrainingSet, open_training, training_slices
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.checkpoint import Checkpoints, TrainState, is_finished
from mstkd.engine.determinism import set_determinism
from mstkd.engine.distributed import agreed, barrier, from_all, on_main
from mstkd.engine.environment import Ranks, resolve_environment, slurm_job
from mstkd.engine.heartbeat import Heartbeat
from mstkd.engine.stage import Stage
from mstkd.engine.startup import Startup
from mstkd.engine.stop import StopFlag, stop_signals, weightier
from mstkd.engine.teacher import FrozenNetworks, identities, load_weights
from mstkd.engine.trainer import Trainer
from mstkd.engine.warm_start import check_order, warm_start
from mstkd.errors import FailedElsewhereError, TrainingError, UserError
from mstkd.evaluate.overlap import refuse_overlap
from mstkd.evaluate.validation import Validation
from mstkd.evaluate.weights import safetensors_of
from mstkd.methods import DataFacts, Method, Role
from mstkd.models.recompute import recompute
from mstkd.teacher_source import given_networks, refuse_seen, sources_of, stages_left_out
from mstkd.track import NullTracker, Tracker
from mstkd.tracked import track

log = logging.getLogger(__name__)


def train(config: RunConfig, stop: StopFlag) -> str | None:
    """Train every stage of a run, or continue it. Returns None, or the name of the signal that stopped it (all is saved).

    Collective: every rank calls it with the same configuration. Raises UserError on bad input, TrainingError when
    the loss stays non-finite.
    """
    startup = Startup()
    startup.reached("imports")
    ranks = resolve_environment()
    set_determinism(config.train.deterministic)
    backend.check_precision(config.train.precision, ranks.device)
    config.train.accumulation(ranks.world)
    methods.read_config(config.method, config.origin)
    methods.check_input(config.method, config.data)
    backend.start(ranks, config.watchdog)
    startup.reached("process_group")
    slices = on_main(lambda: training_slices(config.data, methods.load(config.method["name"]).complete_only), ranks)
    with agreed(ranks):
        run = prepare(config, ranks, slices)
    startup.reached("data_and_networks")
    on_main(lambda: refuse_overlap(run.training.stores, config.data), ranks)
    on_main(lambda: refuse_seen(config, run.training.stores), ranks)
    on_main(lambda: run_folder.open_run(run.config), ranks)
    if on_main(lambda: all(is_finished(config.run_dir / name / "checkpoints") for name in run.stages), ranks):
        log.info("%s: all stages are trained already", config.run_dir)
        return None
    attempt = on_main(lambda: run_folder.record_attempt(run.config, ranks.world, slurm_job()), ranks)
    with (
        logged_to_file(config.run_dir, ranks),
        Heartbeat(config.run_dir, ranks, attempt, config.watchdog) as heartbeat,
        _ending(heartbeat) as ending,
        _trackers(run, attempt) as tracker,
    ):
        startup.reached("run_folder")
        ending.stopped_by = _train_stages(run, tracker, stop, heartbeat, startup)
        if ending.stopped_by:
            tracker.finish("KILLED")
    barrier(ranks)  # nobody leaves before rank 0 has closed its trackers: srun ends all when one leaves with a code
    return ending.stopped_by


@dataclass
class Run:
    """A run whose every setting has been checked, before anything is written."""

    config: RunConfig  # with its `method:` section resolved
    method: Method  # with the networks of the stage that comes first
    training: TrainingSet
    stages: list[str]  # to be trained, in order
    given: set[str]  # frozen networks that come from `teacher.path`
    validation: Validation
    ranks: Ranks


def prepare(config: RunConfig, ranks: Ranks, slices: SliceIndex | None) -> Run:
    """Open the data and build the networks. Raises UserError for whatever in the configuration cannot work."""
    training = open_training(config.data, config.seed, methods.load(config.method["name"]).complete_only, slices)
    method, config = build_method(config, training)
    given = given_networks(config, method, training.sequences)
    stages = stage_roles(config, method, given)
    accumulation = config.train.accumulation(ranks.world)
    settings = [backend.check_role(name, role, config.train, accumulation) for roles in stages.values() for name, role in roles.items()]
    backend.load_ops(settings, config.train.compile, ranks)
    for stage in stages:
        Availability(seen_in(stage, config.data, method).availability, training.sequences)
    if config.inference.window:
        method.check_crop(method.config, config.inference.window, "inference.window")
    if config.init_from:
        safetensors_of(Path(config.init_from))
        check_order(Path(config.init_from), method, training.sequences)
    return Run(config, method, training, list(stages), given, Validation(config, training.stores, ranks, method.subsets), ranks)


def _train_stages(run: Run, tracker: Tracker, stop: StopFlag, heartbeat: Heartbeat, startup: Startup) -> str | None:
    """Train the stages in order; returns the signal that ended it early, the same on every rank."""
    for name in run.stages:
        if name != run.stages[0]:  # with fresh networks, as in a job of its own; those of the last stage may be cut over the ranks
            run = replace(run, method=build_method(run.config, run.training)[0])
        if not _train_stage(name, run, tracker, stop, heartbeat, startup):
            return functools.reduce(weightier, from_all(stop.reason, run.ranks))
    return None


def build_method(config: RunConfig, training: TrainingSet) -> tuple[Method, RunConfig]:
    """The method with freshly initialised networks, and the configuration with its `method:` section and stages resolved."""
    slice_size = config.data.slices.size if config.data.slices else None
    facts = DataFacts(training.sequences, training.stores[0].index.scheme, config.data.crop, training.classification, slice_size)
    torch.manual_seed(config.seed)  # the same initial weights on every rank and for every rank count
    method = methods.build(config.method, facts)
    if config.train.recompute:
        if not method.blocks:
            raise UserError(f"train.recompute: {config.method['name']} names no blocks to compute again; remove the key")
        for network in method.networks.values():
            recompute(network, method.blocks)
    return method, config.model_copy(update={"method": methods.resolve(config.method), "stages": methods.stage_names(config.method, config.stages)})


def chosen_stages(config: RunConfig, method: Method, given: set[str]) -> list[str]:
    """The stages to train, in the method's order; without those that would only train networks which are `given`."""
    asked, left_out = methods.stage_names(config.method, config.stages), stages_left_out(method, given)
    chosen = [name for name in method.stages if (asked is None or name in asked) and name not in left_out]
    if not chosen:
        raise UserError(f"stages: teacher.path gives what {', '.join(config.stages)} would train; ask for the other stages, or remove teacher.path")
    return chosen


def stage_roles(config: RunConfig, method: Method, given: set[str]) -> dict[str, dict[str, Role]]:
    """The stages to train, in order: the roles of each. Raises UserError where the data lacks what a stage trains on, or `train.roles` names one that there is not."""
    stages = {name: method.roles(name) for name in chosen_stages(config, method, given)}
    for name in stages:
        method.check_stage(name)
    steps = config.train.steps
    if isinstance(steps, dict) and (strange := sorted(set(steps) - set(method.stages))):
        raise UserError(f"train.steps.{strange[0]}: {config.method['name']} has no such stage; its stages: {', '.join(method.stages)}")
    known = {role for name in method.stages for role in (stages.get(name) or method.roles(name))}
    if unknown := sorted(set(config.train.roles) - known):
        raise UserError(f"train.roles.{unknown[0]}: {config.method['name']} has no such role; its roles: {', '.join(sorted(known))}")
    return stages


def seen_in(stage: str, data: DataConfig, method: Method) -> DataConfig:
    """The recipe's `data:` section with what the method says about availability in this stage."""
    return data.model_copy(update={"availability": method.availability(stage) or data.availability})


def total_steps(config: RunConfig, stage: str, items_per_epoch: int) -> int:
    """Steps of a stage: as given, or epochs rounded up to whole steps. Raises UserError if the recipe leaves this stage out."""
    steps = config.train.steps
    if isinstance(steps, dict) and stage not in steps:
        raise UserError(f"train.steps: none for stage {stage}; it has {', '.join(steps)}")
    if steps is not None:
        return steps[stage] if isinstance(steps, dict) else steps
    return -(-round(config.train.epochs * items_per_epoch) // config.train.global_batch)


def _train_stage(name: str, run: Run, tracker: Tracker, stop: StopFlag, heartbeat: Heartbeat, startup: Startup) -> bool:
    """Train one stage to its end; False if stopped before."""
    config, method, ranks, roles = run.config, run.method, run.ranks, run.method.roles(name)
    checkpoints = Checkpoints(config.run_dir / name / "checkpoints", ranks, config.checkpoint)
    resumed = on_main(checkpoints.newest_sound, ranks)
    if resumed and resumed[1].finished:
        log.info("stage %s: already finished at step %d", name, resumed[1].step)
        return True
    with agreed(ranks):
        if config.init_from and not resumed:
            warm_start(method, safetensors_of(Path(config.init_from)))
        files = {network: _load_needed(network, earlier, run) for network, earlier in method.needs(name).items()}
        if not resumed:
            method.begin(name)
    trained = {network for role in roles.values() for network in role.results}  # one that is needed and trained only starts from there
    files = {network: parts for network, parts in files.items() if network not in trained}
    before = resumed[1] if resumed else TrainState()
    before.frozen = on_main(lambda: identities({part: file for parts in files.values() for part, file in parts.items()}, before.frozen), ranks)
    for network in {*method.networks} - {*files}:
        method.networks[network].to(ranks.device)
    with agreed(ranks):
        frozen = FrozenNetworks({network: method.networks[network] for network in files}, roles, config.teacher, ranks, _computes(config))
    accumulation = config.train.accumulation(ranks.world)
    engines = {role: RoleEngine(role, roles[role], config.train, accumulation, ranks.device) for role in roles}
    trainer = Trainer(_stage(name, run, engines), ranks, checkpoints, tracker, stop, heartbeat, startup, before)
    if resumed:
        trainer.resume(*resumed)
    startup.reached("engines")
    trainer.tracker = tracker.child(name, start_step=trainer.state.step)
    try:
        finished = trainer.fit()
        frozen.report(name)
    finally:
        for engine in engines.values():
            engine.destroy()
        frozen.destroy()
    if finished:
        trainer.tracker.finish("FINISHED")
    return finished


def _computes(config: RunConfig) -> str:
    """What decides the outputs of a frozen network besides its weights and its input."""
    versions = {name: metadata.version(name) for name in ("mstkd", "torch", "monai")}
    return json.dumps([config.method, versions], sort_keys=True)


def _load_needed(network: str, earlier: str, run: Run) -> dict[str, Path]:
    """Load a network that an earlier stage trains, or `teacher.path` gives; returns the file that it, or each part of it, was in."""
    module, sources = run.method.networks[network], sources_of(network, earlier, run.config, run.given)
    return {source.name: load_weights(module.get_submodule(source.part), source.name, source.files, source.pick) for source in sources}


def _stage(name: str, run: Run, engines: dict[str, RoleEngine]) -> Stage:
    config, training, ranks = run.config, run.training, run.ranks
    steps = total_steps(config, name, training.order.items_per_epoch)
    intensity = Intensity(run.method.intensity)
    data = seen_in(name, config.data, run.method)

    def batches(start_step: int):
        return TrainLoader(
            training, data, intensity, global_batch=config.train.global_batch, micro_batch=config.train.micro_batch,
            total_steps=steps, start_step=start_step, rank=ranks.rank, world=ranks.world,
        )  # fmt: skip

    trained = {network for engine in engines.values() for network in engine.role.results}
    scored = next((network for network in (*run.method.scored, *run.method.painters) if network in trained), None)

    declared = run.method.availability(name)
    complete = declared is not None and declared.kind == "natural"  # what such a stage is chosen by is what it learns from

    def validate(method: Method, stopping: Callable[[], bool]) -> dict[str, float] | None:
        return run.validation(method, stopping, scored, complete) if scored else None

    return Stage(
        name, config, run.method, engines, steps, training.order.items_per_epoch, batches, validate,
        lambda: build_method(config, training)[0],
    )  # fmt: skip


def _trackers(run: Run, attempt: int) -> Tracker:
    return track(run.config, run.method, run.training, run.stages, run.ranks.world, attempt) if run.ranks.main else NullTracker()


@dataclass
class _HowItEnded:
    stopped_by: str | None = None


@contextmanager
def _ending(heartbeat: Heartbeat) -> Iterator[_HowItEnded]:
    """Note in the run folder how this attempt ends: the batch script decides by it whether to start again."""
    how = _HowItEnded()

    def note(outcome: attempts.Outcome, reason: str) -> None:
        beat = heartbeat.beat
        attempts.end(heartbeat.run_dir, beat.attempt, attempts.Ending(outcome, reason, beat.stage, beat.step))

    try:
        yield how
    except FailedElsewhereError:
        raise
    except UserError as error:
        note("bad_input", str(error))
        raise
    except BaseException as error:
        note("failed", f"rank {heartbeat.beat.rank}: {type(error).__name__}: {error}".split("\n")[0])
        raise
    if heartbeat.ranks.main:
        outcome = {None: "finished", "SIGUSR2": "interrupted"}.get(how.stopped_by, "stopped")
        note(outcome, f"by {how.stopped_by}" if how.stopped_by else "all stages trained")


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
    return run_config(lambda: load_config(recipe, overrides))


def run_config(load: Callable[[], RunConfig]) -> int:
    """As `run`, for the configuration that `load()` returns."""
    ranks = None
    try:
        with stop_signals() as stop:
            ranks = resolve_environment()
            config = load()
            log_to_console(ranks.rank)
            stopped_by = train(config, stop)
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
