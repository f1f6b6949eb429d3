"""One stage of a run, ready to train."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mstkd.batch import Batch, Progress
from mstkd.config import RunConfig
from mstkd.engine.backend import RoleEngine
from mstkd.methods import Method

MicroBatches = list[tuple[int, Batch]]  # (index j in the global batch, batch)


@dataclass
class Stage:
    """What the loop needs to know of a stage; everything in it is the same on every rank but the batches."""

    name: str
    config: RunConfig
    method: Method
    engines: dict[str, RoleEngine]  # in update order
    total_steps: int
    items_per_epoch: int
    batches: Callable[[int], Iterable[MicroBatches]]  # from a start step: this rank's micro-batches of each step
    validate: Callable[[Method, Callable[[], bool]], dict[str, float] | None]  # see evaluate.validation.Validation
    plain_copy: Callable[[], Method]  # a method with untrained networks, to hold whole weights under ZeRO-3

    @property
    def folder(self) -> Path:
        """The stage's part of the run folder."""
        return self.config.run_dir / self.name

    def progress(self, step: int) -> Progress:
        """Where training stands before the update `step`, counted from 0."""
        batch = self.config.train.global_batch
        return Progress(
            step=step,
            epoch=step * batch // self.items_per_epoch,
            total_steps=self.total_steps,
            # as asked for: the steps are rounded up to whole ones
            total_epochs=self.config.train.epochs or self.total_steps * batch / self.items_per_epoch,
        )

    def trained_networks(self) -> dict:
        """The networks that the stage's roles train, by name."""
        return {name: self.method.networks[name] for engine in self.engines.values() for name in engine.role.networks}
