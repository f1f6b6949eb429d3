"""One update: a global batch through every role that is due."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mstkd.batch import Progress, StepOutput
from mstkd.engine import seeding
from mstkd.engine.averages import Averages
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import Ranks
from mstkd.engine.flops import FlopCount
from mstkd.engine.frozen import frozen
from mstkd.engine.meter import Meter
from mstkd.engine.schedule import lr_factor
from mstkd.engine.stage import MicroBatches, Stage
from mstkd.errors import TrainingError

log = logging.getLogger(__name__)


class Update:
    """Called once per step; ends a run that non-finite gradients make skip too many in a row."""

    def __init__(self, stage: Stage, ranks: Ranks, averages: dict[str, Averages]):
        self.stage, self.ranks, self.averages = stage, ranks, averages
        self._skipped_in_a_row = 0
        self._flops: dict[str, int] = {}  # of one micro-batch, by role

    def __call__(self, micro_batches: MicroBatches, progress: Progress, meter: Meter) -> bool:
        """Every role that is due runs all its micro-batches and updates, in the declared order. False if non-finite gradients made one skip its update.

        Raises TrainingError after more than `train.max_skipped` skipped updates in a row.
        """
        micro_batches = [(j, batch.to(self.ranks.device)) for j, batch in micro_batches]
        carry: dict[int, dict[str, Tensor]] = {j: {} for j, _ in micro_batches}
        applied = rescaled = True
        for engine in self.stage.engines.values():
            if (progress.step + 1) % engine.role.every == 0:
                done = self._run_role(engine, micro_batches, carry, progress, meter)
                applied, rescaled = applied and done, rescaled and (done or engine.rescaled)
        self._count_skip(applied, rescaled, progress.step)
        return applied

    def _run_role(self, engine: RoleEngine, micro_batches: MicroBatches, carry: dict[int, dict], progress: Progress, meter: Meter) -> bool:
        engine.set_lr_factor(lr_factor(engine.schedule, progress))
        borrowed = [self.stage.method.networks[name] for name in engine.role.borrows]
        outputs: list[StepOutput] = []
        for j, batch in micro_batches:
            seeding.reseed(self.stage.config.seed, progress.step, engine.name, j)
            with frozen(borrowed), self._flops_counted(engine.name, meter):
                with meter.clock.part("forward"):
                    output = engine.forward(batch, carry[j], progress)
                with meter.clock.part("backward"):
                    engine.backward(output.loss)
            with meter.clock.part("optimizer_step"):
                applied = engine.step()
            carry[j] |= output.carry
            outputs.append(StepOutput(output.loss.detach(), output.scalars))
        if not applied:
            self._report_non_finite(engine, outputs, progress.step)
            return False
        self.averages[engine.name].update(progress.step)
        for output in outputs:
            meter.add({f"train/{name}": value for name, value in output.scalars.items()})
            meter.add({f"train/loss_{engine.name}": output.loss})
        return True

    @contextmanager
    def _flops_counted(self, role: str, meter: Meter) -> Iterator[None]:
        """Counts a role's first micro-batch; the others take as many. What is computed anew in the backward pass counts, too."""
        if self.stage.config.train.compile or self.stage.config.teacher.cache_dir:  # compiled networks hide theirs; cached outputs cost none
            yield
            return
        if role not in self._flops:
            with FlopCount() as count:
                yield
            self._flops[role] = count.total
        else:
            yield
        meter.computed(self._flops[role])

    def _report_non_finite(self, engine: RoleEngine, outputs: list[StepOutput], step: int) -> None:
        terms = sorted({name for o in outputs for name, value in {"loss": o.loss, **o.scalars}.items() if not value.isfinite().all()})
        named = ", ".join(terms) or "none on this rank; the gradient is"
        if engine.rescaled and not terms:
            log.info("step %d, role %s: update skipped, loss scale lowered to %g", step, engine.name, engine.scale.value)
        else:
            log.error("step %d, role %s: update skipped, non-finite: %s", step, engine.name, named)

    def _count_skip(self, applied: bool, rescaled: bool, step: int) -> None:
        """`rescaled`: where it was skipped, fp16's loss scale was lowered, which is how it finds its value and no failure yet."""
        if applied:
            self._skipped_in_a_row = 0
        elif not rescaled:
            self._skipped_in_a_row += 1
        limit = self.stage.config.train.max_skipped
        if self._skipped_in_a_row > limit:
            raise TrainingError(
                f"step {step}: {self._skipped_in_a_row} non-finite updates in a row (train.max_skipped {limit}); "
                "lower the learning rate, use train.precision=fp32 or look at the terms named above"
            )
