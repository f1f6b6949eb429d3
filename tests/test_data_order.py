"""The order of training and the draw of the available sequences."""

from collections import Counter

import numpy as np
import pytest
from global_batches import global_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from mstkd.config import AvailabilityConfig
from mstkd.data.availability import Availability
from mstkd.data.order import Order
from mstkd.data.sample import Item
from mstkd.errors import UserError
from mstkd.subsets import all_subsets


def shard_sets(draws, most_sets=2):
    sizes = draws(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=most_sets))
    sets = [[[f"s{t}_{i}" for i in range(n)] for t, n in enumerate(tars)] for tars in sizes]
    repeats = [draws(st.integers(1, 3)) for _ in sets]
    return sets, repeats


@st.composite
def orders(draws):
    sets, repeats = shard_sets(draws)
    if not any(tar for tars in sets for tar in tars):
        sets[0][0] = ["only"]
    seed, window = draws(st.integers(0, 2**40)), draws(st.integers(1, 4))
    return sets, repeats, seed, window


@given(orders(), st.integers(0, 1000))
def test_each_epoch_is_a_permutation_of_the_items_with_their_repeats(order, epoch):
    sets, repeats, seed, window = order
    items = Order(*order).epoch(epoch)
    expected = Counter(
        (source, subject, r) for source, tars in enumerate(sets) for tar in tars for subject in tar for r in range(repeats[source])
    )
    assert Counter((item.source, item.subject, item.repeat) for item in items) == expected
    assert {item.epoch for item in items} == {epoch}


@given(orders(), st.integers(1, 7), st.integers(0, 30))
def test_global_batches_tile_the_stream_and_may_start_anywhere(order, size, step):
    whole = Order(*order)
    n = whole.items_per_epoch
    stream = [item for epoch in range(size * (step + 2) // n + 1) for item in whole.epoch(epoch)]
    for k in (step + 1, step, 0):  # any order of asking
        assert global_batch(Order(*order), k, size) == global_batch(whole, k, size) == stream[k * size : (k + 1) * size]


@given(orders(), st.integers(0, 50))
def test_no_more_than_window_tars_are_open_at_a_time(order, epoch):
    sets, _, _, window = order
    tar_of = {(s, subject): t for s, tars in enumerate(sets) for t, tar in enumerate(tars) for subject in tar}
    visits = [(item.source, tar_of[item.source, item.subject], item.repeat) for item in Order(*order).epoch(epoch)]
    first = {visit: visits.index(visit) for visit in set(visits)}
    last = {visit: len(visits) - 1 - visits[::-1].index(visit) for visit in set(visits)}
    for position in range(len(visits)):
        assert sum(first[v] <= position <= last[v] for v in first) <= window


def test_epochs_and_seeds_differ_and_subjects_mix_across_the_window():
    sets = [[[f"t{t}_{i}" for i in range(4)] for t in range(8)]]
    subjects = lambda seed, epoch: [item.subject for item in Order(sets, [1], seed, 4).epoch(epoch)]  # noqa: E731
    assert subjects(0, 0) != subjects(0, 1) != subjects(1, 1)
    tars = [name.split("_")[0] for name in subjects(0, 0)]
    assert len(set(tars[:4])) > 1  # not tar after tar
    starts = {subjects(0, epoch)[0] for epoch in range(200)}
    assert len(starts) == 32  # every subject can come first


def test_the_order_is_pinned_so_that_an_old_run_resumes_as_it_began():
    order = Order([[["a", "b"], ["c"]], [["d"]]], [1, 2], seed=7, window=2)  # 5 items per epoch
    assert [(i.source, i.subject, i.repeat) for i in global_batch(order, 0, 5)] == [
        (0, "c", 0),
        (1, "d", 1),
        (0, "a", 0),
        (1, "d", 0),
        (0, "b", 0),
    ]


def test_no_training_subject_is_an_error():
    with pytest.raises(UserError, match="no training subject"):
        Order([[[], []]], [1], 0, 1)


def draw(seed, item, present, **config):
    sequences = ("flair", "t1", "t1ce", "t2", "dwi", "swi")[: len(present)]
    return Availability(AvailabilityConfig(**config), sequences).draw(seed, item, present)


@given(st.lists(st.booleans(), min_size=1, max_size=6).filter(any), st.integers(0, 10**6))
def test_a_draw_is_a_non_empty_subset_of_what_is_present(present, epoch):
    available = draw(3, Item(epoch, 0, "subject"), tuple(present))
    assert any(available) and len(available) == len(present)
    assert all(there or not seen for there, seen in zip(present, available, strict=True))


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.sampled_from([(True,) * 4, (True, False, True, True), (False, False, True)]))
def test_all_subsets_are_equally_likely(seed, present):
    n, subsets = 4000, 2 ** sum(present) - 1
    counts = Counter(draw(seed, Item(epoch, 0, "subject"), present) for epoch in range(n))
    assert len(counts) == subsets
    chi_squared = sum((count - n / subsets) ** 2 / (n / subsets) for count in counts.values())
    # 14 degrees of freedom: 50 is passed by chance in 6 of a million seeds
    assert chi_squared < 50


def test_draws_differ_between_items_and_seeds_and_repeat_for_the_same():
    base = [draw(0, Item(e, 0, "s"), (True,) * 4) for e in range(64)]
    assert base == [draw(0, Item(e, 0, "s"), (True,) * 4) for e in range(64)]
    for other in (
        [draw(1, Item(e, 0, "s"), (True,) * 4) for e in range(64)],
        [draw(0, Item(e, 1, "s"), (True,) * 4) for e in range(64)],
        [draw(0, Item(e, 0, "t"), (True,) * 4) for e in range(64)],
        [draw(0, Item(e, 0, "s", 1), (True,) * 4) for e in range(64)],
    ):
        assert 0.5 < sum(a != b for a, b in zip(base, other, strict=True)) / 64  # 14 in 15 expected


def test_size_first_draws_the_number_first():
    """The frequencies of the specification: singles 1/16, pairs 1/24, triples 1/16, all 1/4."""
    counts = Counter(draw(0, Item(epoch, 0, "s"), (True,) * 4, kind="size_first") for epoch in range(48_000))
    expected = {subset: 48_000 / {1: 16, 2: 24, 3: 16, 4: 4}[sum(subset)] for subset in all_subsets("abcd")}
    assert counts.keys() == expected.keys()
    # 14 degrees of freedom: 50 is passed by chance in 6 of a million seeds
    assert sum((counts[subset] - expected[subset]) ** 2 / expected[subset] for subset in expected) < 50


def test_a_rising_draw_hides_nothing_at_first_and_everything_is_uniform_after_the_ramp():
    drawn = {epoch: [draw(0, Item(epoch, 0, f"s{n}"), (True,) * 4, kind="rising", ramp_epochs=10) for n in range(2000)] for epoch in (0, 5, 10, 30)}
    shares = {epoch: sum(not all(subset) for subset in subsets) / 2000 for epoch, subsets in drawn.items()}
    assert shares[0] == 0
    assert shares[5] == pytest.approx(0.5 * 14 / 15, abs=0.05)  # 4 standard deviations
    assert shares[10] == pytest.approx(14 / 15, abs=0.025) and shares[30] == pytest.approx(14 / 15, abs=0.025)
    assert len(set(drawn[30])) == 15


@pytest.mark.parametrize("sequences", [3, 4])
def test_a_proper_draw_always_leaves_something_out_and_every_such_subset_comes_equally_often(sequences):
    """6 or 14 patterns of what is missing, within 5 % of equal shares over 100,000 draws."""
    counts = Counter(draw(0, Item(epoch, 0, "s"), (True,) * sequences, kind="proper") for epoch in range(100_000))
    assert len(counts) == 2**sequences - 2 and not {(True,) * sequences, (False,) * sequences} & counts.keys()
    share = 100_000 / len(counts)
    assert all(abs(count - share) < 0.05 * share for count in counts.values())
    with pytest.raises(UserError, match="data.availability: kind proper leaves a sequence out, and subject s has one alone"):
        draw(0, Item(0, 0, "s"), (False, True, False), kind="proper")


def test_a_fixed_list_is_drawn_from_and_cut_to_what_the_subject_has():
    listed = {"kind": "fixed", "subsets": ["t1", "t1+t2"]}
    items = [Item(0, 0, f"s{n}") for n in range(200)]
    assert Counter(draw(0, item, (True,) * 4, **listed) for item in items).keys() == {(False, True, False, False), (False, True, False, True)}
    assert {draw(0, item, (True, False, True, True), **listed) for item in items} == {(False, False, False, True)}
    with pytest.raises(UserError, match="subject s0 has none of their sequences; list a subset that it has"):
        draw(0, items[0], (True, False, True, False), **listed)
    with pytest.raises(UserError, match="data.availability.subsets: subset 't1gd'"):
        Availability(AvailabilityConfig(kind="fixed", subsets=["t1gd"]), ("flair", "t1"))


@given(st.lists(st.booleans(), min_size=1, max_size=5).filter(any))
def test_natural_availability_hides_nothing(present):
    assert draw(0, Item(0, 0, "s"), tuple(present), kind="natural") == tuple(present)


@given(st.sampled_from(["uniform", "proper", "size_first", "rising", "fixed", "natural"]), st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_what_can_be_drawn_is_what_is_drawn(kind, present):
    present = tuple(present)
    config = AvailabilityConfig(kind=kind, subsets=["a", "b", "c", "a+b+c+d"] if kind == "fixed" else [], ramp_epochs=1)
    availability = Availability(config, "abcd")
    possible = availability.possible([present])
    if possible:
        drawn = {availability.draw(0, Item(epoch, 0, "s"), present) for epoch in range(400)}
        assert drawn == possible


@given(st.integers(0, 2**32), st.lists(st.booleans(), min_size=1, max_size=5).filter(any))
def test_one_sequence_per_subject_for_the_whole_run(seed, present):
    availability, present = Availability(AvailabilityConfig(kind="single"), "abcde"[: len(present)]), tuple(present)
    draw = lambda **item: availability.draw(seed, Item(**{"epoch": 0, "source": 0, "subject": "s", **item}), present)  # noqa: E731
    first = draw()
    assert sum(first) == 1 and availability.possible([present]) == {s for s in all_subsets(present) if sum(s) == 1 and all(p or not a for a, p in zip(s, present))}
    assert {draw(epoch=epoch, repeat=epoch % 2, slice_index=k) for epoch in range(4) for k in (None, 0, 9)} == {first}
    assert {draw(subject=f"s{n}") for n in range(80)} == availability.possible([present])  # and every one of them for somebody


def test_all_sequences_are_equally_likely_and_seeds_and_sets_differ():
    availability = Availability(AvailabilityConfig(kind="single"), ("flair", "t1", "t1ce", "t2"))
    drawn = {key: [availability.draw(key[0], Item(0, key[1], f"s{n}"), (True,) * 4) for n in range(4000)] for key in ((0, 0), (1, 0), (0, 1))}
    counts = Counter(drawn[0, 0])
    assert len(counts) == 4 and sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 30  # 3 degrees of freedom
    for other in ((1, 0), (0, 1)):
        assert 0.7 < np.mean([a != b for a, b in zip(drawn[0, 0], drawn[other])]) < 0.8
