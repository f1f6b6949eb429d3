"""Work on cases, shared out over ranks."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mstkd.engine.distributed import from_all, raise_together
from mstkd.engine.environment import Ranks
from mstkd.engine.stop import Stopped
from mstkd.evaluate.kept import KeptScores

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def score_each(
    subjects: Sequence[str], score: Callable[[str], list[Result]], rank: int = 0, world: int = 1, stopping: Callable[[], bool] | None = None,
    kept: KeptScores | None = None,
) -> list[Result]:  # fmt: skip
    """As `shared_out`, subject by subject, each said when it is scored; what was `kept` is not scored again."""

    def said(number: int) -> list[Result]:
        subject = subjects[number]
        found = kept.read(subject) if kept else None
        scores = found if found is not None else kept.keep(subject, score) if kept else score(subject)
        log.info("%s %s (%d of %d)", "scored" if found is None else "kept the scores of", subject, number + 1, len(subjects))
        return scores

    return shared_out(len(subjects), said, rank, world, stopping)


def shared_out(
    count: int, work: Callable[[int], list[Result]], rank: int = 0, world: int = 1, stopping: Callable[[], bool] | None = None
) -> list[Result]:
    """What `work` makes of the numbers 0 to `count` - 1, one after the other; the same on every rank and for any number of ranks.

    Collective with several ranks. `stopping` (collective) is asked before each round of `world` numbers; raises Stopped when it says so.
    Where `work` fails on one rank, the others finish their own numbers, and then all fail.
    """
    done, problem = [], None
    for first in range(0, count, world):
        if stopping is not None and stopping():
            raise Stopped
        if (number := first + rank) < count and problem is None:
            try:
                done.append((number, work(number)))
            except Exception as error:
                problem = error
                if world == 1:
                    break
    ranks = Ranks(rank, world, rank, torch.device("cpu"))
    raise_together(problem, ranks)
    parts = from_all(done, ranks)
    return [result for _, results in sorted((item for part in parts for item in part), key=lambda item: item[0]) for result in results]
