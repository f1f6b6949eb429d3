"""The order of training: a function of (seed, epoch) alone, never of ranks or workers."""

from collections.abc import Iterator, Mapping, Sequence

from mstkd.data.sample import Item, rng
from mstkd.errors import UserError


class Order:
    """The endless concatenation of per-epoch permutations of the training items.

    Per epoch the tars are permuted and the subjects shuffled inside windows of `window` tars, so that a cache of a
    few tars serves the reader. A set with `repeat` r has each of its tars visited r times per epoch. With `slices` an
    item is one of its subject's slices, and all slices of the window's subjects are shuffled together.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[Sequence[str]]],
        repeats: Sequence[int],
        seed: int,
        window: int,
        slices: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ):
        """`sets[s][t]` lists the training subjects in tar t of shard set s, `slices[s][subject]` the axial slices of each.

        Raises UserError if there is no item.
        """
        self._visits = [
            (source, repeat, places)
            for source, tars in enumerate(sets)
            for repeat in range(repeats[source])
            for tar in tars
            if (places := tuple(_places(tar, slices and slices[source])))
        ]
        self.items_per_epoch = sum(len(places) for _, _, places in self._visits)
        if not self.items_per_epoch:
            raise UserError("data.shards: no training subject is left; see splits.json of the shard set and data.fold")
        self._seed, self.window = seed, window
        self._epochs: dict[int, list[Item]] = {}  # the two newest: one who looks ahead may be in the next epoch already

    def epoch(self, epoch: int) -> list[Item]:
        """The items of one epoch, in order."""
        items = self._epochs.get(epoch)
        if items is None:
            items = self._permutation(epoch)
            # a new dict: another thread may be reading the old one
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: items}
        return items

    def item(self, position: int) -> Item:
        """The item at a position of the endless stream."""
        epoch, place = divmod(position, self.items_per_epoch)
        return self.epoch(epoch)[place]

    def _permutation(self, epoch: int) -> list[Item]:
        draws = rng(self._seed, epoch, "order")
        visits = [self._visits[i] for i in draws.permutation(len(self._visits))]
        items = []
        for start in range(0, len(visits), self.window):
            window = [
                Item(epoch, source, subject, repeat, k)
                for source, repeat, places in visits[start : start + self.window]
                for subject, k in places
            ]
            items += [window[i] for i in draws.permutation(len(window))]
        return items


def _places(tar: Sequence[str], slices: Mapping[str, Sequence[int]] | None) -> Iterator[tuple[str, int | None]]:
    for subject in tar:
        for k in (None,) if slices is None else slices[subject]:
            yield subject, k
