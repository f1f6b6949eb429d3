"""When a stage saves and validates, and what it remembers of it."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mstkd.engine.checkpoint import NotWrittenError
from mstkd.engine.distributed import any_rank, average_buffers, raise_together
from mstkd.engine.new_files import NewFiles
from mstkd.engine.whole_weights import WholeWeights
from mstkd.errors import TrainingError

if TYPE_CHECKING:
    from mstkd.engine.trainer import Trainer

log = logging.getLogger(__name__)

SCORES = {"segmentation": "Dice", "classification": "accuracy", "synthesis": "SSIM"}  # what a validation's score is, by task


class Keeper:
    """Saves and validates for a trainer: between two updates, where all ranks can do it together."""

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.stage, self.ranks = trainer, trainer.stage, trainer.ranks
        self.whole = WholeWeights(trainer.stage, trainer.ranks)
        self._saved_at = time.monotonic()

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of this step, unless there is one. Collective.

        Raises TrainingError if it cannot be written and `checkpoint.on_failure` says stop, or it is the `last`, which nothing follows.
        """
        self.finish()
        trainer = self.trainer
        if trainer.state.step in (0, trainer.checkpoints.saved_step):
            return
        began = time.perf_counter()
        trainer.heartbeat.at("save")
        trainer.heartbeat.keep_out()
        average_buffers(self.stage.trained_networks(), self.ranks)
        shapes = {name: engine.shapes() for name, engine in self.stage.engines.items()}
        background = self.stage.config.checkpoint.background and not last
        with self._saving(last):
            trainer.checkpoints.save(trainer.state, shapes, self._write_roles, background)
        self._saved_at = time.monotonic()  # after a failure, too: it is tried again when the next one is due
        trainer.meter.saved(time.perf_counter() - began)

    def finish(self) -> None:
        """Wait for a save in the background, if there is one, and make it count. Collective. Raises as `save`."""
        if self.trainer.checkpoints.pending:
            self.trainer.heartbeat.keep_out()
            with self._saving():
                self.trainer.checkpoints.finish()

    @contextmanager
    def _saving(self, last: bool = False) -> Iterator[None]:
        try:
            yield
        except NotWrittenError as error:
            kept = self.trainer.checkpoints.saved_step or 0
            self._failed(f"step {error.step}: not saved: {error}", f"the updates after step {kept} are lost", last)

    @property
    def save_overdue(self) -> bool:
        """Whether `checkpoint.every_min` have passed since the last save."""
        every_min = self.stage.config.checkpoint.every_min
        return every_min is not None and time.monotonic() - self._saved_at > 60 * every_min

    def validate_if_due(self) -> None:
        """Save, then score the validation cases: whatever happens during a long validation costs no update.

        Raises Stopped if a stop was asked for meanwhile; the resumed run then validates this step first.
        """
        trainer, state = self.trainer, self.trainer.state
        due = state.step and state.step % self.stage.config.validation.every_steps == 0 or trainer.at_end
        if not due or state.validated_step == state.step:
            return
        self.save()
        self.finish()
        began = time.perf_counter()
        before = state.best_score, state.best_step
        improved = self._validate()
        self.whole.put_away()
        state.validated_step, state.finished = state.step, trainer.at_end
        if not self._keep_validated(improved):
            state.best_score, state.best_step = before
        trainer.meter.pause(time.perf_counter() - began)

    def _keep_validated(self, improved: bool) -> bool:
        """Note in this step's checkpoint that it is validated, and its weights if they are the best. False if that failed."""
        if self.trainer.checkpoints.saved_step != self.trainer.state.step:
            return False  # there is none: it could not be written
        try:
            self.trainer.checkpoints.amend(self.trainer.state, self.whole.write if improved else None)
        except NotWrittenError as error:
            self._failed(f"step {error.step}: its validation{' and best weights' * improved} not kept: {error}", "no update is lost", self.trainer.at_end)
            return False
        return True

    def _failed(self, what: str, consequence: str, last: bool) -> None:
        """Say what could not be written and stop, or count it and go on."""
        state, name = self.trainer.state, self.stage.name
        line = f"stage {name}: {what}"
        if last or self.stage.config.checkpoint.on_failure == "stop":
            advice = "make room there and give the same command again" + ("" if last else ", or set checkpoint.on_failure=continue")
            raise_together(TrainingError(f"{line}; {consequence}: {advice}") if self.ranks.main else None, self.ranks)
        state.failed_saves += 1
        kept = self.trainer.checkpoints.saved_step
        log.error("%s; %s, going on (checkpoint.on_failure=continue)", line, f"that of step {kept} stays" if kept else "there is none before it")
        self.trainer.tracker.log_metrics({"checkpoint/failed_saves": float(state.failed_saves)}, state.step, name)

    def _validate(self) -> bool:
        """Score the validation cases; True if this is the best so far. Without cases the newest counts as best."""
        state = self.trainer.state
        figures = self.stage.validate(self.whole.method(), self._stopping_validation)
        if figures is None:
            state.best_step = state.step
            return True
        self.trainer.tracker.log_validation(figures, state.step, self.stage.name)
        score = figures["score"]
        name = "PSNR" if score == figures.get("psnr") else SCORES[self.stage.method.task]
        log.info("stage %s: step %d: validation %s %.4f", self.stage.name, state.step, name, score)
        if math.isfinite(score) and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_step = score, state.step
            return True
        return False

    def _stopping_validation(self) -> bool:
        """Asked by the validation before each round of cases. Collective."""
        self.trainer.heartbeat.at("validate", part=self.trainer.heartbeat.beat.part + 1)
        stopping = any_rank([bool(self.trainer.stop)], self.ranks)[0]
        if stopping:
            self.save(last=True)  # where the save before this validation failed
        return stopping

    def _write_roles(self, files: NewFiles) -> None:
        for name, engine in self.stage.engines.items():
            engine.save(files)
            self.trainer.averages[name].save(files)
