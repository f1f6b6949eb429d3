"""Which sequences are given, or may be seen: every non-empty subset, in one order, under one name.

Results are keyed by subset name, never by position: papers and released code list the subsets in different orders.
"""

from collections.abc import Sequence
from itertools import combinations

from mstkd.errors import UserError

Subset = tuple[bool, ...]  # per sequence in the data set's order, True = given


def all_subsets(sequences: Sequence[str]) -> list[Subset]:
    """The 2^M - 1 non-empty subsets of `sequences`, by size, then in the data set's order."""
    count = len(sequences)
    chosen = (c for size in range(1, count + 1) for c in combinations(range(count), size))
    return [tuple(i in c for i in range(count)) for c in chosen]


def part_of(subset: Subset, present: Subset) -> bool:
    """Whether all that `subset` asks for is present."""
    return all(here or not asked for asked, here in zip(subset, present, strict=True))


def possible_subsets(sequences: Sequence[str], names: Sequence[str] | None) -> list[Subset]:
    """Those of `all_subsets` that a method takes, by name; None: all of them."""
    return [subset for subset in all_subsets(sequences) if names is None or subset_name(sequences, subset) in names]


def largest_given(subject: str, sequences: Sequence[str], allowed: Sequence[str] | None, present: Subset) -> Subset:
    """All that a case has, or the largest subset that a method takes, by name; of equal ones the first. Raises UserError if there is none."""
    if allowed is None:
        return present
    fitting = [subset for name in allowed if part_of(subset := parse_subset(name, sequences), present)]
    if not fitting:
        raise UserError(
            f"{subject}: has {subset_name(sequences, present)}, and this run's network needs {', '.join(allowed)}; add what is missing, or use another run"
        )
    return max(fitting, key=sum)


def proper(subsets: Sequence[Subset]) -> list[Subset]:
    """Those of `subsets` that leave a sequence out."""
    return [subset for subset in subsets if not all(subset)]


def subset_name(sequences: Sequence[str], subset: Subset) -> str:
    """Names of the given sequences joined by "+", e.g. "flair+t1ce"."""
    return "+".join(name for name, given in zip(sequences, subset, strict=True) if given)


def parse_subset(name: str, sequences: Sequence[str]) -> Subset:
    """The subset called `name`; raises UserError on an unknown or repeated sequence."""
    wanted = name.split("+")
    unknown = [part for part in wanted if part not in sequences]
    if unknown or len(set(wanted)) != len(wanted):
        raise UserError(f"subset {name!r}: join different ones of {', '.join(sequences)} by '+', e.g. {'+'.join(sequences[:2])}")
    return tuple(sequence in wanted for sequence in sequences)
