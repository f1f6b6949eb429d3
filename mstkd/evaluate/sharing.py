"""Work on cases, shared out over ranks."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from mstkd.engine.stop import Stopped

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def score_each(
    subjects: Sequence[str], score: Callable[[str], list[Result]], rank: int = 0, world: int = 1, stopping: Callable[[], bool] | None = None
) -> list[Result]:
    """As `shared_out`, subject by subject, each said when it is scored."""

    def said(number: int) -> list[Result]:
        scores = score(subjects[number])
        log.info("scored %s (%d of %d)", subjects[number], number + 1, len(subjects))
        return scores

    return shared_out(len(subjects), said, rank, world, stopping)


def shared_out(
    count: int, work: Callable[[int], list[Result]], rank: int = 0, world: int = 1, stopping: Callable[[], bool] | None = None
) -> list[Result]:
    """What `work` makes of the numbers 0 to `count` - 1, one after the other; the same on every rank and for any number of ranks.

    Collective with several ranks. `stopping` (collective) is asked before each round of `world` numbers; raises Stopped when it says so.
    """
    done = []
    for first in range(0, count, world):
        if stopping is not None and stopping():
            raise Stopped
        if (number := first + rank) < count:
            done.append((number, work(number)))
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, done)
        done = sorted((item for part in parts for item in part), key=lambda item: item[0])
    return [result for _, results in done for result in results]
