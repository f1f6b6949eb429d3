"""The training loop of one stage. It knows roles, steps and checkpoints, and no method."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mstkd.engine.averages import Averages
from mstkd.engine.backend import timed_collectives
from mstkd.engine.checkpoint import Checkpoints, TrainState
from mstkd.engine.distributed import raise_together, sums
from mstkd.engine.environment import Ranks
from mstkd.engine.figures import collect_figures, say_figures
from mstkd.engine.heartbeat import Heartbeat
from mstkd.engine.keeper import Keeper
from mstkd.engine.meter import Meter
from mstkd.engine.resume import load_roles
from mstkd.engine.stage import MicroBatches, Stage
from mstkd.engine.startup import Startup
from mstkd.engine.stop import StopFlag, Stopped
from mstkd.engine.trace import Trace
from mstkd.engine.update import Update
from mstkd.errors import TrainingError, UserError
from mstkd.track import Tracker

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    stage: Stage
    ranks: Ranks
    checkpoints: Checkpoints
    tracker: Tracker
    stop: StopFlag
    heartbeat: Heartbeat
    startup: Startup = field(default_factory=Startup)
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self):
        self.meter = Meter(self.ranks)
        self.averages = {name: Averages(engine, self.stage.method.networks, self.ranks) for name, engine in self.stage.engines.items()}
        self.update = Update(self.stage, self.ranks, self.averages)
        self.keeper = Keeper(self)
        self.trace = Trace(self.stage.config.profile.steps, self.stage.folder / "profile", self.ranks)

    def resume(self, folder: Path, state: TrainState) -> None:
        """Continue from a sound checkpoint. Collective."""
        load_roles(folder, self.stage.engines, self.ranks)
        for averages in self.averages.values():
            averages.load(folder)
        self.state = state
        self.checkpoints.saved_step = state.step
        log.info("stage %s: resumed at step %d", self.stage.name, state.step)

    def fit(self) -> bool:
        """Train to the end of the stage. False if a stop was asked for: everything is saved then, too."""
        self.heartbeat.at("data", stage=self.stage.name, step=self.state.step, total_steps=self.stage.total_steps)
        self._source, self._counted = self.stage.batches(self.state.step), 0
        batches = iter(self._source)
        try:
            self.keeper.validate_if_due()  # a stop may have come before this step's validation was done
            self.meter.restart()
            while self.state.step < self.stage.total_steps:
                with timed_collectives(self.meter.clock):
                    self._step(batches)
                self._housekeeping()
        except TrainingError:  # on all ranks alike: what is being written may still count
            self.keeper.finish()
            raise
        except Stopped:
            if self.meter.steps:
                self._log_figures()
            log.warning("stage %s: stopped by %s after step %d; saved", self.stage.name, self.stop.reason or "another rank", self.state.step)
            return False
        finally:
            self._keep_trace(self.trace.close())
        return True

    def _step(self, batches: Iterator[MicroBatches]) -> None:
        """Wait for data, agree with the other ranks, update."""
        self.trace.before(self.state.step + 1)
        micro_batches = self._next(batches)
        self.heartbeat.at("step")
        applied = self.update(micro_batches, self.stage.progress(self.state.step), self.meter)
        self.state.skipped_updates += not applied
        self.state.step += 1
        self.heartbeat.at("step", step=self.state.step)
        self.meter.step_done()
        self._keep_trace(self.trace.after(self.state.step))
        if figures := self.startup.first_update():
            self.tracker.log_metrics(figures, self.state.step, self.stage.name)

    def _keep_trace(self, path: Path | None) -> None:
        if path is not None and self.ranks.main:
            self.tracker.log_artifact(path, f"profile/{self.stage.name}")

    def _next(self, batches: Iterator[MicroBatches]) -> MicroBatches:
        """The next step's micro-batches, once all ranks have theirs; saves first if asked to or if one has none.

        Raises Stopped if any rank was told to stop: between two updates, where all ranks can save together.
        """
        micro_batches, problem = [], None
        self.heartbeat.at("data")
        with self.meter.clock.part("data_wait"):
            try:
                micro_batches = next(batches)
                for _, batch in micro_batches:
                    self.stage.method.check_available(batch.available)
            except Exception as error:
                problem = error
        self.heartbeat.at("agree")
        votes = [problem is not None, bool(self.stop), self.keeper.save_overdue, self._newly_skipped(), self.checkpoints.writing]
        failed, stopping, save, skipped, writing = sums(votes, self.ranks)
        if not writing:
            self.keeper.finish()
        if not failed and self.state.bad_samples + skipped > self.stage.config.data.max_bad_samples:
            failed, problem = True, self._too_many_bad(skipped)
        if failed or stopping or save:
            self.keeper.save(last=failed or stopping)
        self.state.bad_samples += skipped  # after saving: a resume asks for this step's samples again
        if failed:
            raise_together(problem, self.ranks)
        if stopping:
            raise Stopped
        return micro_batches

    def _newly_skipped(self) -> int:
        """Bad samples that this rank's loader has skipped since the last step."""
        before, self._counted = self._counted, getattr(self._source, "bad_samples", 0)
        return self._counted - before

    def _too_many_bad(self, newly: int) -> UserError:
        return UserError(
            f"data.max_bad_samples {self.stage.config.data.max_bad_samples}: {self.state.bad_samples + newly} samples were skipped in this stage, "
            "by all ranks in all attempts; logs/rank-*.log names them: copy or build their tars again, or raise the limit"
        )

    def _housekeeping(self) -> None:
        """Log, save and validate, each when due."""
        config, step = self.stage.config, self.state.step
        if step % config.train.log_every == 0 or self.at_end:
            self._log_figures()
        if step % config.checkpoint.every_steps == 0 or self.at_end:
            self.keeper.save(last=self.at_end)
        self.keeper.validate_if_due()

    @property
    def at_end(self) -> bool:
        return self.state.step == self.stage.total_steps

    def _log_figures(self) -> None:
        step = self.state.step
        figures = collect_figures(self.stage, step, self.meter, self.state.skipped_updates, self.ranks.device)
        self.tracker.log_metrics(figures, step, self.stage.name)
        self.heartbeat.beat.steps_per_s = figures["time/steps_per_s"]
        say_figures(self.stage, step, figures)
