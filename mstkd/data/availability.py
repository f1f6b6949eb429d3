"""Which sequences the student may see: drawn anew for every item."""

from collections.abc import Iterable, Sequence

import numpy as np

from mstkd.config import AvailabilityConfig
from mstkd.data.sample import Item, item_rng, rng
from mstkd.errors import UserError
from mstkd.subsets import Subset, parse_subset


class Availability:
    """The draws of a recipe's `data.availability`: functions of (seed, item) alone, `single` of (seed, subject)."""

    def __init__(self, config: AvailabilityConfig, sequences: Sequence[str]):
        """Raises UserError if a listed subset names a sequence that the data does not have."""
        self.config = config
        try:
            self._listed = [parse_subset(name, sequences) for name in config.subsets]
        except UserError as error:
            raise UserError(f"data.availability.subsets: {error}") from None

    def draw(self, seed: int, item: Item, present: Subset, shown: Item | None = None) -> Subset:
        """A non-empty subset of the `present` sequences. Raises UserError if none of the listed ones has a part in them, or if
        one is to be left out of a single one.

        `shown`: the item whose subject is seen in the place of `item`'s, if that cannot be read.
        """
        draws = item_rng(seed, item, "availability")
        match self.config.kind:
            case "natural":
                return present
            case "fixed":
                return _one_of(_within(self._listed, present, item), draws)
            case "single":  # whoever stands in for another subject must not show a second sequence of its own
                shown = shown or item
                return _of_size(1, present, rng(seed, shown.source, shown.subject, "single"))
            case "proper":
                return _proper(present, draws, item)
            case "size_first":
                return _of_size(int(draws.integers(1, sum(present) + 1)), present, draws)
            case "rising" if draws.random() >= item.epoch / self.config.ramp_epochs:
                return present
        return _uniform(present, draws)

    def possible(self, patterns: Iterable[Subset]) -> set[Subset]:
        """What can be drawn for subjects with these present sequences."""
        if self.config.kind == "natural":
            return set(patterns)
        if self.config.kind == "fixed":
            return {part for pattern in patterns for listed in self._listed if any(part := _both(listed, pattern))}
        if self.config.kind == "proper":
            return {part for pattern in patterns for part in _parts(pattern) if part != pattern}
        parts = {part for pattern in patterns for part in _parts(pattern)}
        return {part for part in parts if sum(part) == 1} if self.config.kind == "single" else parts


def _uniform(present: Subset, draws: np.random.Generator) -> Subset:
    return _part(present, int(draws.integers(1, 2 ** sum(present))))


def _proper(present: Subset, draws: np.random.Generator, item: Item) -> Subset:
    if sum(present) == 1:
        raise UserError(f"data.availability: kind proper leaves a sequence out, and subject {item.subject} has one alone; leave it out of the splits")
    return _part(present, int(draws.integers(1, 2 ** sum(present) - 1)))


def _of_size(size: int, present: Subset, draws: np.random.Generator) -> Subset:
    chosen = draws.choice(np.flatnonzero(present), size, replace=False)
    return tuple(index in chosen for index in range(len(present)))


def _one_of(subsets: Sequence[Subset], draws: np.random.Generator) -> Subset:
    return subsets[int(draws.integers(len(subsets)))]


def _within(listed: Iterable[Subset], present: Subset, item: Item) -> list[Subset]:
    """What the subject has of the listed subsets, where it has something of them."""
    parts = [part for subset in listed if any(part := _both(subset, present))]
    if not parts:
        raise UserError(f"data.availability.subsets: subject {item.subject} has none of their sequences; list a subset that it has, or leave it out of the splits")
    return parts


def _both(one: Subset, other: Subset) -> Subset:
    return tuple(a and b for a, b in zip(one, other, strict=True))


def _parts(present: Subset) -> list[Subset]:
    return [_part(present, number) for number in range(1, 2 ** sum(present))]


def _part(present: Subset, number: int) -> Subset:
    """The subset of `present` whose members are the bits of `number`, lowest first."""
    part = []
    for there in present:
        part.append(there and bool(number & 1))
        number >>= there
    return tuple(part)
