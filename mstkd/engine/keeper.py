"""When a stage saves and validates, and what it remembers of it."""

import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mstkd.engine.distributed import any_rank, average_buffers
from mstkd.engine.whole_weights import WholeWeights

if TYPE_CHECKING:
    from mstkd.engine.trainer import Trainer

log = logging.getLogger(__name__)


class Keeper:
    """Saves and validates for a trainer: between two updates, where all ranks can do it together."""

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.stage, self.ranks = trainer, trainer.stage, trainer.ranks
        self.whole = WholeWeights(trainer.stage, trainer.ranks)
        self._saved_at = time.monotonic()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one. Collective."""
        if self.trainer.state.step in (0, self.trainer.checkpoints.saved_step):
            return
        began = time.perf_counter()
        self.trainer.heartbeat.at("save")
        self.trainer.heartbeat.keep_out()
        average_buffers(self.stage.trained_networks(), self.ranks)
        self.trainer.checkpoints.save(self.trainer.state, self._write_roles)
        self._saved_at = time.monotonic()
        self.trainer.meter.saved(time.perf_counter() - began)

    @property
    def save_overdue(self) -> bool:
        """Whether `checkpoint.every_min` have passed since the last save."""
        every_min = self.stage.config.checkpoint.every_min
        return every_min is not None and time.monotonic() - self._saved_at > 60 * every_min

    def validate_if_due(self) -> None:
        """Save, then score the validation cases: whatever happens during a long validation costs no update.

        Raises Stopped if a stop was asked for meanwhile; the resumed run then validates this step first.
        """
        due = self.trainer.state.step and self.trainer.state.step % self.stage.config.validation.every_steps == 0 or self.trainer.at_end
        if not due or self.trainer.state.validated_step == self.trainer.state.step:
            return
        self.save()
        began = time.perf_counter()
        improved = self._validate()
        self.trainer.state.validated_step, self.trainer.state.finished = self.trainer.state.step, self.trainer.at_end
        self.trainer.checkpoints.amend(self.trainer.state, self.whole.write if improved else None)
        self.trainer.meter.pause(time.perf_counter() - began)

    def _validate(self) -> bool:
        """Score the validation cases; True if this is the best so far. Without cases the newest counts as best."""
        figures = self.stage.validate(self.whole.method(), self._stopping_validation)
        if figures is None:
            self.trainer.state.best_step = self.trainer.state.step
            return True
        self.trainer.tracker.log_metrics({f"val/{name}": value for name, value in figures.items()}, self.trainer.state.step, self.stage.name)
        score = figures["score"]
        log.info("stage %s: step %d: validation Dice %.4f", self.stage.name, self.trainer.state.step, score)
        if math.isfinite(score) and (self.trainer.state.best_score is None or score > self.trainer.state.best_score):
            self.trainer.state.best_score, self.trainer.state.best_step = score, self.trainer.state.step
            return True
        return False

    def _stopping_validation(self) -> bool:
        """Asked by the validation before each round of cases. Collective."""
        self.trainer.heartbeat.at("validate", part=self.trainer.heartbeat.beat.part + 1)
        return any_rank([bool(self.trainer.stop)], self.ranks)[0]

    def _write_roles(self, folder: Path) -> None:
        for name, engine in self.stage.engines.items():
            engine.save(folder)
            self.trainer.averages[name].save(folder)
