"""The stream of samples: one and the same for every way of sharing it out, and a function of its keys alone."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from global_batches import global_batch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_data_loader import data_config, loader_of, micro_batches, same
from tiny_shards import TARS, write_set

from mstkd.config import IntensityConfig
from mstkd.data.intensity import Intensity
from mstkd.data.loader import Share, Stages
from mstkd.data.order import Order
from mstkd.data.sample import Item, item_rng, rng
from mstkd.data.training import open_training


@st.composite
def streams(draws):
    """An order and the sizes of its batches: (arguments of Order, micro-batch, micro-batches per step)."""
    sizes = draws(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6), min_size=1, max_size=3))
    sizes[0][0] = max(sizes[0][0], 1)
    sets = [[[f"s{t}_{i}" for i in range(n)] for t, n in enumerate(tars)] for tars in sizes]
    repeats = [draws(st.integers(1, 3)) for _ in sets]
    order = (sets, repeats, draws(st.integers(0, 2**40)), draws(st.integers(1, 8)))
    return order, draws(st.integers(1, 3)), draws(st.sampled_from([1, 2, 4, 6, 12]))


def divisors(n):
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])


def read_by(order, micro, per_step, world, workers, start, stop):
    """{(step, j): items}, as `world` ranks with `workers` loader processes each read steps start .. stop - 1."""
    batches = {}
    for rank in range(world):
        share = Share(micro * per_step, micro, rank, world, start, stop)
        own = [map(Order(*order).item, share.positions(worker, workers)) for worker in range(workers)]
        for number, (j, _) in enumerate(share.micro_batches()):  # the loader asks its workers in turn
            items = [next(own[number % workers]) for _ in range(micro)]
            step = start + number // share.accumulation
            assert (step, j) not in batches
            batches[step, j] = items
        assert not any(list(rest) for rest in own)  # nothing is read that nobody asks for
    return batches


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(streams(), st.data())
def test_the_global_batches_are_the_same_however_they_are_shared_out(stream, data):
    order, micro, per_step = stream
    stop = data.draw(st.integers(1, 12), "stop step")
    world, workers = data.draw(divisors(per_step), "ranks"), data.draw(st.integers(1, 5), "workers")
    found = read_by(order, micro, per_step, world, workers, 0, stop)
    assert found.keys() == {(step, j) for step in range(stop) for j in range(per_step)}
    whole = Order(*order)
    for step in range(stop):
        assert list(chain(*(found[step, j] for j in range(per_step)))) == global_batch(whole, step, micro * per_step)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(streams(), st.data())
def test_a_resume_at_any_step_on_any_ranks_and_workers_continues_exactly(stream, data):
    order, micro, per_step = stream
    stop, total = sorted(data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=2), "stop and total steps"))
    ranks, workers = [data.draw(st.tuples(divisors(per_step), divisors(per_step)), "ranks"), data.draw(st.tuples(*[st.integers(1, 5)] * 2), "workers")]
    before = read_by(order, micro, per_step, ranks[0], workers[0], 0, stop)
    after = read_by(order, micro, per_step, ranks[1], workers[1], stop, total)
    assert not before.keys() & after.keys()
    assert before | after == read_by(order, micro, per_step, 1, 1, 0, total)


@given(streams(), st.integers(1, 4))
def test_every_position_is_consumed_once_and_every_item_once_per_epoch(stream, epochs):
    order, micro, per_step = stream
    n = Order(*order).items_per_epoch
    steps = -(-epochs * n // (micro * per_step))
    found = read_by(order, micro, per_step, per_step, 2, 0, steps)
    items = [item for key in sorted(found) for item in found[key]]
    assert len(items) == steps * micro * per_step
    seen = Counter(item for item in items if item.epoch < epochs)
    assert len(seen) == epochs * n and set(seen.values()) == {1}
    expected = {(s, subject, r) for s, tars in enumerate(order[0]) for tar in tars for subject in tar for r in range(order[1][s])}
    for epoch in range(epochs):
        assert {(i.source, i.subject, i.repeat) for i in seen if i.epoch == epoch} == expected


@given(streams())
def test_epochs_differ_in_their_order(stream):
    order, *_ = stream
    whole = Order(*order)
    assume(whole.items_per_epoch >= 12)  # by chance the same: 1 in 12!
    orders = [tuple((i.source, i.subject, i.repeat) for i in whole.epoch(epoch)) for epoch in range(6)]
    assume(sum(bool(tar) for tars in order[0] for tar in tars) > 1 or order[3] > 1)
    assert len(set(orders)) > 1


@given(streams(), st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_positions_may_be_asked_for_in_any_order(stream, positions):
    order, *_ = stream
    shared = Order(*order)
    assert [shared.item(p) for p in positions] == [Order(*order).item(p) for p in positions]


items = st.builds(Item, st.integers(0, 10**6), st.integers(0, 3), st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), st.integers(0, 5))


@given(st.integers(0, 2**40), items, st.integers(0, 500))
def test_a_slice_has_draws_of_its_own_and_a_volume_keeps_those_it_had(seed, item, k):
    drawn = item_rng(seed, item, "crop").random(4).tolist()
    assert drawn == rng(seed, item.epoch, item.source, item.subject, item.repeat, "crop").random(4).tolist()
    slices = [Item(item.epoch, item.source, item.subject, item.repeat, k + n) for n in (0, 1)]
    others = [item_rng(seed, one, "crop").random(4).tolist() for one in slices]
    assert len({tuple(values) for values in [drawn, *others]}) == 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    present = {"c0": ("flair", "t2"), "a1": ("t1",), "d0": ("t1", "t1ce")}
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", TARS, present=present)


@pytest.fixture(scope="module")
def stages(shards):
    config = data_config(shards)
    training = open_training(config, 5, complete_only=False)
    return Stages(training, config, Intensity(IntensityConfig(kind="percentile")), Share(4, 1, 0, 1, 0, 5))


def prepared(stages, item):
    """All that training sees of one item, as bytes."""
    drawn = stages.take(item)
    image = np.empty((4, 8, 8, 8), np.float32)
    stages.normalise(drawn, image)
    available = stages.availability.draw(stages.training.seed, item, tuple(s in drawn.sample.meta.sequences for s in stages.training.sequences))
    return drawn.subject, image.tobytes(), drawn.sample.brain.tobytes(), drawn.sample.label.tobytes(), available


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_crops_masks_and_augmentation_depend_on_the_item_alone(shards, stages, positions, noise):
    """Not on what was read before (`stages` remembers foregrounds), on who reads, nor on any global generator."""
    np.random.seed(noise)
    fresh = Stages(open_training(stages.config, 5, False), stages.config, stages.intensity, Share(8, 2, 1, 2, 3, 9))
    for position in positions:
        item = fresh.training.order.item(position)
        assert prepared(fresh, item) == prepared(stages, item)


def test_subjects_that_lack_sequences_train_beside_complete_ones(shards):
    found = micro_batches(data_config(shards, workers=2), total_steps=9)
    seen = {}
    for batch in found.values():
        seen.setdefault(batch.subject[0], set()).add(tuple(batch.present[0].tolist()))
        assert batch.available.any() and not (batch.available & ~batch.present).any()
        absent = ~batch.present[0]
        assert (batch.image[0, absent] == batch.hidden_value).all() and (batch.image[0, ~absent] != batch.hidden_value).any()
    assert seen == {key: {present} for key, present in {
        **{key: (True,) * 4 for tar in TARS for key in tar},
        "c0": (True, False, False, True), "a1": (False, True, False, False), "d0": (False, True, True, False),
    }.items()}  # fmt: skip


def test_a_method_that_needs_all_sequences_gets_complete_subjects_only_and_the_others_are_counted(shards, caplog):
    loader = loader_of(data_config(shards, workers=2), complete_only=True, total_steps=9)
    batches = [batch for step in loader for _, batch in step]
    assert {batch.subject[0] for batch in batches} == {key for tar in TARS for key in tar} - {"c0", "a1", "d0"}
    assert all(batch.present.all() for batch in batches)
    assert "3 training subjects dropped, a sequence or the label is missing: a1, c0, d0" in caplog.text


@pytest.mark.parametrize("first, then", [((1, 0), (4, 3)), ((4, 2), (2, 1)), ((2, 3), (1, 2))])
def test_real_workers_of_mixed_sets_continue_on_other_ranks(shards, tmp_path, first, then):
    other = write_set(tmp_path / "other", [["x0", "x1"], ["y0"]])
    joined = {}
    for (world, workers), steps in ((first, {"total_steps": 3}), (then, {"start_step": 3, "total_steps": 7})):
        for rank in range(world):
            joined |= micro_batches(data_config(shards, (other, 2), workers=workers, shuffle_window=3), world=world, rank=rank, **steps)
    assert same(joined, micro_batches(data_config(shards, (other, 2), shuffle_window=3), total_steps=7))
