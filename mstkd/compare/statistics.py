"""The statistics of a comparison, on plain arrays. The unit is the patient.

Scores come as (S, P, ...): S seeds, P patients whose scans have been averaged, then whatever is compared. NaN: not
scored, the same for every seed. Seeds are averaged before anything is tested; they are no further patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

REPLICATES = 10_000
LEVEL = 95.0  # per cent, of every interval
FEWEST_PATIENTS = 6  # with 5 the smallest two-sided p of the signed-rank test is 0.0625
EXACT_LIMIT, PERMUTATION_LIMIT = 50, 13  # patients; where SciPy's "auto" leaves the exact distribution, and the permutations, behind
DECIMALS = 12  # of a difference: further ones are rounding in the mean over seeds, which breaks ties and gives zeros a sign


@dataclass(frozen=True)
class SignedRank:
    """A paired, two-sided Wilcoxon signed-rank test; `p` None where it is not given, `says` how or why."""

    p: float | None
    says: str


class Replicates:
    """How often each patient counts in each bootstrap replicate: the same for everything that is compared."""

    def __init__(self, patients: int, seed: int, replicates: int = REPLICATES):
        self._seed = seed
        self.patients = _counts(np.random.default_rng([seed, 0]), patients, replicates)

    def means(self, scores: NDArray[np.float64], stream: int) -> NDArray[np.float64]:
        """(B, ...) means of scores (S, P, ...) over patients and seeds, both drawn with replacement.

        Arms that are subtracted need different streams (from 1): their trainings are independent. The seeds are drawn once
        per replicate, for all patients together: another training shifts every patient's score at once. (Drawn anew for
        each patient, that shift would average out.)
        """
        seeds, patients, *rest = scores.shape
        flat = scores.reshape(seeds, patients, -1)
        weights = _counts(np.random.default_rng([self._seed, stream]), seeds, len(self.patients)) / seeds
        total = sum(weights[:, s, None] * (self.patients @ np.nan_to_num(flat[s])) for s in range(seeds))
        known = self.patients @ np.isfinite(flat[0]).astype(float)
        return np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0).reshape(-1, *rest)


def interval(replicates: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The percentile interval (low, high), each (...), of replicates (B, ...)."""
    margin = (100 - LEVEL) / 2
    missing = np.isnan(replicates).all(axis=0)
    low, high = np.nanpercentile(np.where(missing, 0.0, replicates), [margin, 100 - margin], axis=0)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def mean_finite(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The mean over what is known; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def seed_spread(scores: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(...) standard deviation over seeds (n - 1) of the mean over patients of scores (S, P, ...); None with one seed."""
    return mean_finite(scores, axis=1).std(axis=0, ddof=1) if len(scores) > 1 else None


def signed_rank(differences: NDArray[np.float64]) -> SignedRank:
    """Wilcoxon's test of paired differences (P,); NaN (a patient without a score) is left out.

    Zeros are split between both signs (`zsplit`). SciPy's method "auto": the exact distribution up to 50 patients
    without ties or zeros; with some, all sign changes up to 13 patients; else the normal approximation, corrected for ties.
    """
    differences = np.round(differences[np.isfinite(differences)], DECIMALS)
    count = len(differences)
    if count < FEWEST_PATIENTS:
        return SignedRank(None, f"not given: {count} patients, and fewer than {FEWEST_PATIENTS} cannot reach 0.05")
    if not differences.any():
        return SignedRank(1.0, "all differences are zero")
    result = wilcoxon(differences, zero_method="zsplit", alternative="two-sided", method="auto")
    plain = differences.all() and len(np.unique(np.abs(differences))) == count
    if plain and count <= EXACT_LIMIT:
        return SignedRank(float(result.pvalue), "exact")
    return SignedRank(float(result.pvalue), "all sign changes" if count <= PERMUTATION_LIMIT else "normal approximation")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p values, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _counts(rng: np.random.Generator, things: int, replicates: int) -> NDArray[np.float64]:
    """(B, N): how often each of N things is drawn in N draws with replacement."""
    return rng.multinomial(things, np.full(things, 1 / things), size=replicates).astype(float)
