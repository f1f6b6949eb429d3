"""Learning rate as a pure function of progress: nothing to save, nothing to restore."""

import math

from mstkd.batch import Progress
from mstkd.config import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, progress: Progress) -> float:
    """The factor on the optimiser's lr for this step; positive for every step of the run (poly, step, constant).

    With `per: epoch` the factor is held during an epoch: poly is (1 - e/E)^power with e counted from 0. `step` is
    gamma^(e // every_epochs), whatever `per` says. `linear` falls from 1 after `constant_share` of all epochs, or steps, to
    min_lr_ratio in the last one.
    """
    if progress.step < schedule.warmup_steps:
        return (progress.step + 1) / schedule.warmup_steps
    if schedule.name == "step":
        return schedule.gamma ** (progress.epoch // schedule.every_epochs)
    if schedule.per == "epoch":
        begun, whole = progress.epoch, math.ceil(progress.total_epochs)
    else:
        before = schedule.after_steps - schedule.warmup_steps
        begun, whole = progress.step + before, max(progress.total_steps + before, 1)
    done = begun / whole
    if schedule.name == "poly":
        return (1 - done) ** schedule.power
    if schedule.name == "cosine":
        return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2
    if schedule.name == "linear":
        fallen = (min((begun + 1) / whole, 1) - schedule.constant_share) / (1 - schedule.constant_share)
        return 1 - (1 - schedule.min_lr_ratio) * max(fallen, 0)
    return 1.0
