"""From arms to cells and tests."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mstkd.compare.arms import Arm, Axes
from mstkd.compare.result import MEAN, Cell, PairedTest
from mstkd.compare.statistics import Replicates, holm, interval, mean_finite, seed_spread, signed_rank
from mstkd.measures import Estimate

BASELINE_STREAM, ARM_STREAM = 1, 2  # of the seeds' draws: the same for every pair, so that no arm depends on who else is there


def cells(arms: Sequence[Arm], baseline: Arm, axes: Axes, replicates: Replicates) -> Iterator[Cell]:
    """Every arm x (pattern or mean) x measure. An arm's mean is over its own patterns, its difference over those that both have."""
    for arm in arms:
        stream = BASELINE_STREAM if arm is baseline else ARM_STREAM
        own = with_mean(arm.scores, arm.patterns)
        per_patient = mean_finite(own, axis=0)  # (P, U + 1, R)
        value, (low, high) = mean_finite(per_patient, axis=0), interval(replicates.means(own, stream))
        beside = mean_finite(mean_finite(with_mean(arm.beside, arm.patterns), axis=0), axis=0)
        difference = None if arm is baseline else _difference(arm, baseline, replicates)
        for u, pattern in enumerate((*axes.patterns, MEAN)):
            for r, measure in enumerate(axes.measures):
                if np.isfinite(value[u, r]):
                    pairs, estimates = difference or (None, None)
                    compared = difference is not None and np.isfinite(estimates[0][u, r])
                    yield Cell(
                        arm.label, pattern, measure.key,
                        patients=int(np.isfinite(per_patient[:, u, r]).sum()),
                        seeds=len(arm.seeds),
                        score=Estimate(float(value[u, r]), float(low[u, r]), float(high[u, r])),
                        difference=Estimate(*(float(part[u, r]) for part in estimates)) if compared else None,
                        p=signed_rank(pairs[:, u, r]).p if compared and pattern != MEAN and not arm.mark else None,
                        beside=float(beside[u, r]),
                    )  # fmt: skip


def tests(arms: Sequence[Arm], baseline: Arm, primary: str | None, axes: Axes, replicates: Replicates) -> Iterator[PairedTest]:
    """Every other arm against the baseline, measure by measure; Holm over the primary ones of one arm. What is marked is not tested."""
    for arm in arms:
        common = both(arm, baseline)
        if arm is baseline or arm.mark or not any(common):
            continue
        pairs, estimates = _difference(arm, baseline, replicates)
        found = [signed_rank(pairs[:, -1, r]) for r in range(len(axes.measures))]
        given = [r for r, test in enumerate(found) if test.p is not None and axes.measures[r].primary]
        adjusted = dict(zip(given, holm([found[r].p for r in given]), strict=True))
        spreads = [seed_spread(with_mean(one.scores, common)[:, :, -1]) for one in (arm, baseline)]
        for r, measure in enumerate(axes.measures):
            yield PairedTest(
                arm.label, baseline.label, measure.key,
                primary=measure.primary and primary in (None, arm.label),
                patients=int(np.isfinite(pairs[:, -1, r]).sum()),
                patterns=sum(common),
                difference=Estimate(*(float(part[-1, r]) for part in estimates)),
                seed_sd=None if spreads[0] is None else float(spreads[0][r]),
                baseline_seed_sd=None if spreads[1] is None else float(spreads[1][r]),
                p=found[r].p,
                p_holm=adjusted.get(r),
                says=found[r].says,
            )  # fmt: skip


def with_mean(scores: NDArray[np.float64], patterns: Sequence[bool]) -> NDArray[np.float64]:
    """(S, P, U + 1, R): the scores (S, P, U, R) and, last, the mean over `patterns`: those of them that a patient has."""
    mean = mean_finite(scores[:, :, np.asarray(patterns, bool)], axis=2)
    return np.concatenate([scores, mean[:, :, None]], axis=2)


def both(arm: Arm, baseline: Arm) -> tuple[bool, ...]:
    """Per pattern: whether both arms have it."""
    return tuple(a and b for a, b in zip(arm.patterns, baseline.patterns, strict=True))


def _difference(arm: Arm, baseline: Arm, replicates: Replicates) -> tuple[NDArray, tuple[NDArray, NDArray, NDArray]]:
    """(P, U + 1, R) differences of the patients, and (value, low, high), each (U + 1, R); the same patients in both arms."""
    common = both(arm, baseline)
    ours, theirs = with_mean(arm.scores, common), with_mean(baseline.scores, common)
    pairs = mean_finite(ours, axis=0) - mean_finite(theirs, axis=0)
    drawn = replicates.means(ours, ARM_STREAM) - replicates.means(theirs, BASELINE_STREAM)
    return pairs, (mean_finite(pairs, axis=0), *interval(drawn))
