"""Which sequences the student may see: drawn anew for every item."""

from mstkd.data.sample import Item, item_rng


def draw(seed: int, item: Item, present: tuple[bool, ...]) -> tuple[bool, ...]:
    """One of the non-empty subsets of the `present` sequences, each equally likely; a function of (seed, item)."""
    subset = int(item_rng(seed, item, "availability").integers(1, 2 ** sum(present)))
    available = []
    for there in present:
        available.append(there and bool(subset & 1))
        subset >>= there
    return tuple(available)
