"""How the runs of a sweep are ranked: by validation alone, in the stage that the most advanced of them has come to."""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

SCORE = "val/score"  # the one figure that ranks a sweep
Best = dict[str, tuple[float, int]]  # by stage, in the order of training: the best score and its step
Run = TypeVar("Run", bound=Hashable)


def best_scores(points: Iterable[tuple[str, float, int]]) -> Best:
    """Of (stage, score, step) in the order of training; of equal scores the first counts."""
    best: Best = {}
    for stage, score, step in points:
        if stage not in best or score > best[stage][0]:
            best[stage] = score, step
    return best


def leading(found: Mapping[Run, Best]) -> tuple[str | None, dict[Run, tuple[float, int]]]:
    """The stage, and the best score in it with its step, of those runs that have one, best first; of equal runs the first."""
    furthest = max(found.values(), key=len, default={})
    stage = next(reversed(furthest), None)
    reached = [(run, stages[stage]) for run, stages in found.items() if stage in stages]
    return stage, dict(sorted(reached, key=lambda pair: -pair[1][0]))
