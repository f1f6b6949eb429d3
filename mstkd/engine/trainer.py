"""The training loop of one stage. It knows roles, steps and checkpoints, and no method."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from safetensors.torch import save
from torch import Tensor

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import RunConfig
from mstkd.engine import seeding
from mstkd.engine.backend import RoleEngine, frozen
from mstkd.engine.checkpoint import Checkpoints, TrainState
from mstkd.engine.distributed import any_rank, average_buffers, raise_together, sums
from mstkd.engine.environment import Ranks
from mstkd.engine.heartbeat import Heartbeat
from mstkd.engine.meter import Meter
from mstkd.engine.schedule import lr_factor
from mstkd.engine.stop import StopFlag, Stopped
from mstkd.errors import TrainingError, UserError
from mstkd.methods import Method
from mstkd.track import Tracker

log = logging.getLogger(__name__)
MicroBatches = list[tuple[int, Batch]]  # (index j in the global batch, batch)


@dataclass
class Stage:
    """One stage of a run, ready to train."""

    name: str
    config: RunConfig
    method: Method
    engines: dict[str, RoleEngine]  # in update order
    total_steps: int
    items_per_epoch: int
    batches: Callable[[int], Iterable[MicroBatches]]  # from a start step: this rank's micro-batches of each step
    validate: Callable[[Method, Callable[[], bool]], dict[str, float] | None]  # see evaluate.validation.Validation
    plain_copy: Callable[[], Method]  # a method with untrained networks, to hold whole weights under ZeRO-3


@dataclass
class Trainer:
    stage: Stage
    ranks: Ranks
    checkpoints: Checkpoints
    tracker: Tracker
    stop: StopFlag
    heartbeat: Heartbeat
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self):
        self.meter = Meter(self.ranks)
        self._skipped_in_a_row = self._skipped = 0
        self._saved_at = time.monotonic()
        self._copy: Method | None = None

    def resume(self, folder: Path, state: TrainState) -> None:
        """Continue from a sound checkpoint. Collective."""
        for engine in self.stage.engines.values():
            engine.load(folder)
        self.state = state
        self.checkpoints.saved_step = state.step
        log.info("stage %s: resumed at step %d", self.stage.name, state.step)

    def fit(self) -> bool:
        """Train to the end of the stage. False if a stop was asked for: everything is saved then, too."""
        self.heartbeat.at("data", stage=self.stage.name, step=self.state.step, total_steps=self.stage.total_steps)
        self._source, self._counted = self.stage.batches(self.state.step), 0
        batches = iter(self._source)
        self.meter = Meter(self.ranks)
        try:
            self._validate_if_due()  # a stop may have come before this step's validation was done
            while self.state.step < self.stage.total_steps:
                micro_batches = self._next(batches)
                self.heartbeat.at("step")
                self.train_step(micro_batches)
                self.state.step += 1
                self.heartbeat.at("step", step=self.state.step)
                self.meter.step_done()
                self._housekeeping()
        except Stopped:
            if self.meter.steps:
                self._log_figures()
            log.warning("stage %s: stopped by %s after step %d; saved", self.stage.name, self.stop.reason or "another rank", self.state.step)
            return False
        return True

    def _next(self, batches: Iterator[MicroBatches]) -> MicroBatches:
        """The next step's micro-batches, once all ranks have theirs; saves first if asked to or if one has none.

        Raises Stopped if any rank was told to stop: between two updates, where all ranks can save together.
        """
        began, micro_batches, problem = time.perf_counter(), [], None
        self.heartbeat.at("data")
        try:
            micro_batches = next(batches)
        except Exception as error:
            problem = error
        self.meter.waited(time.perf_counter() - began)
        self.heartbeat.at("agree")
        votes = [problem is not None, bool(self.stop), self._save_overdue(), self._newly_skipped()]
        failed, stopping, save, skipped = sums(votes, self.ranks)
        if not failed and self.state.bad_samples + skipped > self.stage.config.data.max_bad_samples:
            failed, problem = True, self._too_many_bad(skipped)
        if failed or stopping or save:
            self._save()
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

    def train_step(self, micro_batches: MicroBatches) -> None:
        """One global batch: every role that is due runs all its micro-batches and updates, in the declared order."""
        progress = self._progress(self.state.step)
        micro_batches = [(j, batch.to(self.ranks.device)) for j, batch in micro_batches]
        carry: dict[int, dict[str, Tensor]] = {j: {} for j, _ in micro_batches}
        applied = True
        for engine in self.stage.engines.values():
            if (progress.step + 1) % engine.role.every == 0:
                applied &= self._run_role(engine, micro_batches, carry, progress)
        self._count_skip(applied)

    def _run_role(self, engine: RoleEngine, micro_batches: MicroBatches, carry: dict[int, dict], progress: Progress) -> bool:
        engine.set_lr_factor(lr_factor(engine.schedule, progress))
        borrowed = [self.stage.method.networks[name] for name in engine.role.borrows]
        outputs: list[StepOutput] = []
        for j, batch in micro_batches:
            seeding.reseed(self.stage.config.seed, progress.step, engine.name, j)
            with frozen(borrowed):
                output = engine.forward_backward(batch, carry[j], progress)
            applied = engine.step()
            carry[j] |= output.carry
            outputs.append(StepOutput(output.loss.detach(), output.scalars))
        if not applied:
            self._report_non_finite(engine.name, outputs)
            return False
        for output in outputs:
            self.meter.add({f"train/{name}": value for name, value in output.scalars.items()})
            self.meter.add({f"train/loss_{engine.name}": output.loss})
        return True

    def _report_non_finite(self, role: str, outputs: list[StepOutput]) -> None:
        terms = sorted({name for o in outputs for name, value in {"loss": o.loss, **o.scalars}.items() if not value.isfinite().all()})
        named = ", ".join(terms) or "none on this rank; the gradient is"
        log.error("step %d, role %s: update skipped, non-finite: %s", self.state.step, role, named)

    def _count_skip(self, applied: bool) -> None:
        self._skipped += not applied
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        limit = self.stage.config.train.max_skipped
        if self._skipped_in_a_row > limit:
            raise TrainingError(
                f"step {self.state.step}: {self._skipped_in_a_row} non-finite updates in a row (train.max_skipped {limit}); "
                "lower the learning rate, use train.precision=fp32 or look at the terms named above"
            )

    def _progress(self, step: int) -> Progress:
        stage, batch = self.stage, self.stage.config.train.global_batch
        return Progress(
            step=step,
            epoch=step * batch // stage.items_per_epoch,
            total_steps=stage.total_steps,
            # as asked for: the steps are rounded up to whole ones
            total_epochs=stage.config.train.epochs or stage.total_steps * batch / stage.items_per_epoch,
        )

    def _housekeeping(self) -> None:
        """Log, save and validate, each when due."""
        config, step = self.stage.config, self.state.step
        if step % config.train.log_every == 0 or self._at_end:
            self._log_figures()
        if step % config.checkpoint.every_steps == 0 or self._at_end:
            self._save()
        self._validate_if_due()

    @property
    def _at_end(self) -> bool:
        return self.state.step == self.stage.total_steps

    def _save(self) -> None:
        if self.state.step in (0, self.checkpoints.saved_step):
            return
        began = time.perf_counter()
        self.heartbeat.at("save")
        self.heartbeat.keep_out()
        average_buffers(self._trained_networks(), self.ranks)
        self.checkpoints.save(self.state, self._write_roles)
        self._saved_at = time.monotonic()
        self.meter.saved(time.perf_counter() - began)

    def _save_overdue(self) -> bool:
        every_min = self.stage.config.checkpoint.every_min
        return every_min is not None and time.monotonic() - self._saved_at > 60 * every_min

    def _validate_if_due(self) -> None:
        """Save, then score the validation cases: whatever happens during a long validation costs no update.

        Raises Stopped if a stop was asked for meanwhile; the resumed run then validates this step first.
        """
        due = self.state.step and self.state.step % self.stage.config.validation.every_steps == 0 or self._at_end
        if not due or self.state.validated_step == self.state.step:
            return
        self._save()
        began = time.perf_counter()
        improved = self._validate()
        self.state.validated_step, self.state.finished = self.state.step, self._at_end
        self.checkpoints.amend(self.state, self._write_whole if improved else None)
        self.meter.pause(time.perf_counter() - began)

    def _validate(self) -> bool:
        """Score the validation cases; True if this is the best so far. Without cases the newest counts as best."""
        figures = self.stage.validate(self._whole_method(), self._stopping_validation)
        if figures is None:
            self.state.best_step = self.state.step
            return True
        self.tracker.log_metrics({f"val/{name}": value for name, value in figures.items()}, self.state.step, self.stage.name)
        score = figures["score"]
        log.info("stage %s: step %d: validation Dice %.4f", self.stage.name, self.state.step, score)
        if math.isfinite(score) and (self.state.best_score is None or score > self.state.best_score):
            self.state.best_score, self.state.best_step = score, self.state.step
            return True
        return False

    def _stopping_validation(self) -> bool:
        """Asked by the validation before each round of cases. Collective."""
        self.heartbeat.at("validate", part=self.heartbeat.beat.part + 1)
        return any_rank([bool(self.stop)], self.ranks)[0]

    def _trained_networks(self) -> dict:
        return {name: self.stage.method.networks[name] for e in self.stage.engines.values() for name in e.role.networks}

    def _whole_method(self) -> Method:
        """The method with full weights: itself, or under ZeRO-3 a plain copy, whose forwards need no other rank."""
        if all(engine.zero_stage < 3 for engine in self.stage.engines.values()):
            return self.stage.method
        if self._copy is None:
            self._copy = self.stage.plain_copy()
            for network in self._copy.networks.values():
                network.to(self.ranks.device)
        for engine in self.stage.engines.values():
            with engine.whole_weights():
                for name in engine.role.networks:
                    self._copy.networks[name].load_state_dict(self.stage.method.networks[name].state_dict())
        return self._copy

    def _write_roles(self, folder: Path) -> None:
        for engine in self.stage.engines.values():
            engine.save(folder)

    def _write_whole(self, folder: Path) -> None:
        """<role>.safetensors: what evaluate, predict, export and later stages read. Collective."""
        for role, engine in self.stage.engines.items():
            with engine.whole_weights():
                if self.ranks.main:
                    weights = {
                        f"{name}.{key}": value.detach().cpu().contiguous().clone()
                        for name in engine.role.networks
                        for key, value in self.stage.method.networks[name].state_dict().items()
                    }
                    (folder / f"{role}.safetensors").write_bytes(save(weights))  # save_file makes files for the owner alone

    def _log_figures(self) -> None:
        config, step = self.stage.config, self.state.step
        figures = self.meter.flush(config.train.global_batch)
        progress = self._progress(step - 1)  # of the update just done
        for engine in self.stage.engines.values():
            figures[f"lr/{engine.name}"] = engine.optimizer.lr * lr_factor(engine.schedule, progress)
            norm = engine.gradient_norm()
            if norm is not None:
                figures[f"gradient_norm/{engine.name}"] = norm
        figures["train/skipped_steps"] = float(self._skipped)
        figures["memory/peak_gib"] = peak_memory_gib(self.ranks.device)
        self.tracker.log_metrics(figures, step, self.stage.name)
        losses = " ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in figures.items() if k.startswith("train/loss_"))
        rate = self.heartbeat.beat.steps_per_s = figures["time/steps_per_s"]
        eta = timedelta(seconds=round((self.stage.total_steps - step) / rate))
        log.info(
            "%s step %d/%d  %s  %.2f step/s  data wait %.0f %%  %.2f GiB  ETA %s",
            self.stage.name, step, self.stage.total_steps, losses, rate,
            100 * figures["time/data_wait_share"], figures["memory/peak_gib"], eta,
        )  # fmt: skip


def peak_memory_gib(device: torch.device) -> float:
    """Peak device memory of this process on a GPU, else its resident memory now, in GiB (1024^3 bytes)."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 1024**3
