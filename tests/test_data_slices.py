"""Training on axial slices: which ones, in which order, what a batch holds; exact across ranks, workers and resumes."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from global_batches import global_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from slice_shards import BOX, SIDE, subject_members, write_slices
from test_data_augment import sample_of
from test_data_loader import micro_batches, same
from test_data_stream import divisors, read_by
from tiny_shards import SEQUENCES, SHAPE, TARS, npy

from mstkd.bench.cost import bench_cost
from mstkd.config import AugmentConfig, DataConfig, IntensityConfig, RunConfig
from mstkd.data.augment import augment_geometry
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader
from mstkd.data.order import Order
from mstkd.data.planes import Plane
from mstkd.data.sample import Sample, rng
from mstkd.data.slices import read_slice
from mstkd.data.store import ShardStore
from mstkd.data.training import open_training, training_slices
from mstkd.errors import UserError
from mstkd.launch.cluster import Cluster
from mstkd.launch.submit import prepare
from mstkd.plan import plan

SIZE = 16
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
AUGMENT = {"flip_prob": 0.5, "rotate_deg": 20, "zoom": 0.1, "intensity_scale": 0.1, "noise_std": 0.05}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_slices(tmp_path_factory.mktemp("sets") / "slices", TARS, test=("b1",), present={"c0": ("flair", "t2")})


def data_config(folder, slices=None, **fields):
    base = {"shards": [{"path": str(folder)}], "slices": {"size": SIZE, "min_brain": 0.1, **(slices or {})}, "augment": AUGMENT}
    return DataConfig(**{**base, "workers": 0, "shuffle_window": 2, **fields})


def indexed(config):
    """{subject: slices} of the first set."""
    slices = {}
    for item in open_training(config, 0, False).order.epoch(0):
        slices.setdefault(item.subject, []).append(item.slice_index)
    return {subject: sorted(chosen) for subject, chosen in slices.items()}


# which slices


def pixels_seen(mask, size):
    """How many pixels of the square a stored mask (X, Y) fills, by the definition of the nearest voxel alone."""
    axis = [(2 * n + 1) * SIDE // (2 * size) for n in range(size)]
    start = [(SIDE - n) // 2 + low for n, (low, _) in zip((18, 22), BOX)]
    inside = lambda x, y: 0 <= x - start[0] < SHAPE[0] and 0 <= y - start[1] < SHAPE[1]  # noqa: E731
    return sum(bool(mask[x - start[0], y - start[1]]) for x in axis for y in axis if inside(x, y))


@pytest.mark.parametrize("region", [None, "WT", "TC", "ET"])
@pytest.mark.parametrize(("size", "min_brain", "pixels"), [(16, 0.1, 4), (16, 0.0, 2), (32, 0.2, 10), (60, 0.05, 40)])
def test_slices_have_brain_enough_and_show_the_region_as_networks_would_see_it(shards, region, size, min_brain, pixels):
    found = indexed(data_config(shards, {"size": size, "min_brain": min_brain, "region": region, "min_region_pixels": pixels}))
    store = ShardStore(shards)
    expected = {}
    for subject in store.fold(0).train:
        sample = store.subject(subject)
        for k in range(SHAPE[2]):
            share = (sample.brain[..., k] > 0).sum() / SIDE**2
            shown = region is None or pixels_seen(np.isin(sample.label[..., k], REGIONS[region]), size) >= pixels
            if share >= min_brain and shown:
                expected.setdefault(subject, []).append(k)
    assert found == expected and len(expected) > 3
    assert min_brain == 0 and region is None or sum(map(len, expected.values())) < 8 * SHAPE[2]


def test_every_slice_that_is_read_shows_so_many_pixels_of_the_region(shards):
    config = data_config(shards, {"region": "TC", "min_region_pixels": 4}, augment={"flip_prob": 0})
    counts = [torch.isin(batch.label, torch.tensor([1, 4])).sum().item() for batch in micro_batches(config, total_steps=10).values()]
    assert min(counts) >= 4 and max(counts) > min(counts)


def test_subjects_without_a_slice_are_dropped_counted_and_said(tmp_path, caplog):
    empty = npy(np.zeros(SHAPE, np.uint8))
    folder = write_slices(tmp_path / "s", TARS, replace={("a1", "brain.npy"): empty, ("d0", "brain.npy"): empty})
    training = open_training(data_config(folder), 0, False)
    assert training.dropped == ["a1", "d0"]
    assert "2 training subjects dropped, no axial slice of theirs meets data.slices: a1, d0" in caplog.text
    assert {item.subject for item in training.order.epoch(0)} == {key for tar in TARS for key in tar} - {"a1", "d0"}
    assert training.order.items_per_epoch == len(training.order.epoch(0)) == len(set(training.order.epoch(0)))


def test_what_one_process_found_serves_another(shards):
    config = data_config(shards)
    slices = training_slices(config, False)
    handed, own = (open_training(config, 3, False, found) for found in (slices, None))
    assert handed.order.epoch(2) == own.order.epoch(2) and handed.dropped == own.dropped == []
    assert training_slices(config.model_copy(update={"slices": None, "crop": (8, 8, 8)}), False) is None


@pytest.mark.parametrize(("fields", "options", "message"), [
    ({"slices": {"min_brain": 0.9}}, {}, r"data\.slices\.min_brain 0\.9: no slice of the 9 training subjects has so much brain; lower it"),
    ({"slices": {"region": "ET", "min_region_pixels": 99}}, {}, r"data\.slices\.min_region_pixels 99: no slice .* of ET at 16 pixels per axis; lower it"),
    ({"slices": {"region": "WT"}}, {"label_scheme": "tissue3"}, r"data\.slices\.region WT: label scheme tissue3 .* has only CSF, GM, WM; remove the key"),
    ({"slices": {"region": "WT"}}, {"label_scheme": None, "unlabelled": sum(TARS, [])}, r"data\.slices\.region WT: .* has no labels; remove the key"),
    ({"foreground_share": 0.5}, {}, r"data\.foreground_share: places crops of volumes, .* remove the key"),
    ({"crop": (8, 8, 8)}, {}, r"data\.slices: given together with data\.crop; remove one of them"),
])  # fmt: skip
def test_what_cannot_be_asked_of_slices_is_one_line(tmp_path, fields, options, message):
    folder = write_slices(tmp_path / "s", TARS, **options)
    with pytest.raises(UserError, match=message) as error:
        open_training(data_config(folder, **fields), 0, False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("meta", [{"crop_box": [[2, 12], [7, 19], [1, 11]]}, {"crop_box": [[6, 20], [7, 19], [1, 11]]}, {"orientation": "XYZ"}])
def test_meta_data_that_contradict_the_volume_are_a_bad_subject(tmp_path, meta, caplog):
    wrong = {**json.loads(subject_members("a0")["meta.json"]), **meta}
    folder = write_slices(tmp_path / "s", TARS, replace={("a0", "meta.json"): json.dumps(wrong).encode()})
    assert open_training(data_config(folder), 0, False).dropped == ["a0"]
    assert "subject left out: " in caplog.text and "subject a0: crop_box does not fit its volume or its grid" in caplog.text
    with pytest.raises(UserError, match="subject a0: crop_box .* or data.on_bad_sample=skip leaves such subjects out"):
        open_training(data_config(folder, on_bad_sample="stop"), 0, False)


# in which order


@st.composite
def slice_orders(draws):
    """Arguments of Order."""
    sizes = draws(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=2))
    sizes[0][0] = max(sizes[0][0], 1)
    sets = [[[f"s{t}_{i}" for i in range(n)] for t, n in enumerate(tars)] for tars in sizes]
    slices = [{key: sorted(draws(st.sets(st.integers(0, 9), max_size=4))) for tar in tars for key in tar} for tars in sets]
    slices[0]["s0_0"] = slices[0]["s0_0"] or [3]
    return sets, [draws(st.integers(1, 3)) for _ in sets], draws(st.integers(0, 2**40)), draws(st.integers(1, 4)), slices


@given(slice_orders(), st.integers(0, 1000))
def test_each_epoch_is_a_permutation_of_the_slices_within_windows_of_tars(order, epoch):
    sets, repeats, _, window, slices = order
    items = Order(*order).epoch(epoch)
    assert items == Order(*order).epoch(epoch)
    every = [(s, key, r, k) for s, tars in enumerate(sets) for tar in tars for key in tar for r in range(repeats[s]) for k in slices[s][key]]
    assert Counter((item.source, item.subject, item.repeat, item.slice_index) for item in items) == Counter(every)
    assert len(items) == Order(*order).items_per_epoch == len(every)
    visits = [(item.source, item.subject.split("_")[0], item.repeat) for item in items]
    for position in range(len(visits)):
        assert len(set(visits[: position + 1]) & set(visits[position:])) <= window


@settings(max_examples=50)
@given(slice_orders(), st.integers(0, 30))
def test_the_order_of_volumes_is_what_it_was_before_there_were_slices(order, epoch):
    """One slice each: the same subjects in the same places, as the draws depend on the numbers of items alone."""
    sets, repeats, seed, window, _ = order
    single = [{key: [7] for tar in tars for key in tar} for tars in sets]
    volumes, slices = Order(sets, repeats, seed, window).epoch(epoch), Order(sets, repeats, seed, window, single).epoch(epoch)
    assert [(i.source, i.subject, i.repeat) for i in volumes] == [(i.source, i.subject, i.repeat) for i in slices]
    assert {i.slice_index for i in volumes} == {None}


@settings(max_examples=60)
@given(slice_orders(), st.data())
def test_slices_are_shared_out_and_resumed_exactly(order, data):
    micro, per_step = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4, 6]))
    stop, total = sorted(data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2)))
    first, then = ((data.draw(divisors(per_step)), data.draw(st.integers(1, 4))) for _ in range(2))
    found = read_by(order, micro, per_step, *first, 0, stop) | read_by(order, micro, per_step, *then, stop, total)
    assert found == read_by(order, micro, per_step, 1, 1, 0, total)


def test_slices_of_different_subjects_mix(shards):
    items = open_training(data_config(shards), 0, False).order.epoch(0)
    assert sum(one.subject != other.subject for one, other in zip(items, items[1:])) > len(items) / 2
    assert len({item.slice_index for item in items[:8]}) > 3


# what a batch holds


@pytest.fixture(scope="module")
def reference(shards):
    return micro_batches(data_config(shards), total_steps=20)  # 80 of some 60 slices: the second epoch has begun


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (4, 3)])
def test_batches_are_bitwise_equal_for_every_rank_and_worker_count(shards, reference, world, workers):
    joined = {}
    for rank in range(world):
        joined |= micro_batches(data_config(shards, workers=workers), world=world, rank=rank, total_steps=20)
    assert same(joined, reference)


@pytest.mark.parametrize("start", [3, 17])
def test_a_resume_in_the_middle_of_an_epoch_continues_exactly(shards, reference, start):
    joined = {}
    for rank in range(2):
        joined |= micro_batches(data_config(shards, workers=1), start_step=start, total_steps=20, world=2, rank=rank)
    assert same(joined, {key: batch for key, batch in reference.items() if key[0] >= start})


def test_staged_tars_serve_the_same_slices(shards, reference, tmp_path):
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    config = data_config(shards, cache_dir=str(tmp_path / "cache"), cache_gib=2 * largest / 2**30)
    assert same(micro_batches(config, total_steps=20), reference)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 2 * largest


@pytest.mark.parametrize("kind", ["zscore", "percentile", "reference_minmax"])
@pytest.mark.parametrize("size", [SIZE, SIDE, 40])
def test_a_slice_is_normalised_and_brought_and_only_that(shards, size, kind):
    config = data_config(shards, {"size": size}, augment={"flip_prob": 0})
    training, intensity = open_training(config, 5, False), Intensity(IntensityConfig(kind=kind, interval=(-1, 1)))
    (step,) = TrainLoader(training, config, intensity, global_batch=12, micro_batch=12, total_steps=1)
    batch = step[0][1]
    assert batch.image.shape == (12, 4, size, size) and batch.image.dtype == torch.float32 and batch.hidden_value == intensity.hidden_value
    assert batch.brain.shape == batch.label.shape == (12, size, size) and (batch.brain.dtype, batch.label.dtype) == (torch.bool, torch.uint8)
    for place, item in enumerate(global_batch(training.order, 0, 12)):
        sample, k = training.stores[0].subject(item.subject), item.slice_index
        plane = Plane.of(sample.meta, size)
        assert batch.subject[place] == item.subject and batch.present[place].tolist() == [name in sample.meta.sequences for name in SEQUENCES]
        label, brain = (torch.tensor(stored[..., k]) for stored in (sample.label, sample.brain))
        assert torch.equal(batch.label[place], plane.bring_labels(label)) and torch.equal(batch.brain[place], plane.bring_labels(brain) > 0)
        volume = torch.from_numpy(intensity.apply(sample.image.astype(np.float32), sample.brain, sample.meta, SEQUENCES))
        for channel in range(4):
            # outside the box stands what the normalisation makes of the background, as inside it (raw 0 is the floor of these subjects' range)
            expected = plane.bring(volume[channel, ..., k], 0.0 if kind == "zscore" else -1.0)
            torch.testing.assert_close(batch.image[place, channel], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("crops", ["fresh", "fixed"])
def test_fixed_crops_show_a_slice_alike_in_every_epoch(shards, crops):
    config = data_config(shards, {"min_brain": 0.28}, crops=crops)
    items = open_training(config, 5, False).order
    found = micro_batches(config, total_steps=3 * items.items_per_epoch, global_batch=1)
    seen: dict = {}
    for position, (_, batch) in enumerate(sorted(found.items())):
        item = items.item(position)
        seen.setdefault((item.subject, item.slice_index), []).append(batch)
    assert len(seen) == items.items_per_epoch > 8
    for batches in seen.values():
        assert len({batch.image.numpy().tobytes() for batch in batches}) == (1 if crops == "fixed" else 3) and len(batches) == 3


def test_slices_are_flipped_along_x_and_y_and_turned_in_their_plane():
    number = np.arange(64).reshape(8, 8, 1)
    corners = set()
    for i in range(60):
        moved = augment_geometry(sample_of(number[None].astype(np.float32), label=number.astype(np.uint8)), AugmentConfig(flip_prob=0.5), rng(i), axial=True)
        assert (moved.label == moved.image[0]).all() and sorted(moved.label.flat) == list(range(64))
        corners.add(int(moved.label[0, 0, 0]))
    assert corners == {0, 7, 56, 63}
    disc = (sum((np.mgrid[:21, :21] - 10) ** 2) <= 60).astype(np.uint8)[..., None]
    for i in range(40):  # turned about X or Y, one layer of voxels would leave its plane and fade
        moved = augment_geometry(sample_of(disc[None].astype(np.float32), disc, disc), AugmentConfig(rotate_deg=180), rng(i), axial=True)
        assert (moved.image[0, 6:15, 6:15] > 0.999).all() and abs(int(moved.brain.sum()) - int(disc.sum())) <= 12


def test_nothing_is_cut_off_where_a_slice_is_turned():
    """A brain that fills its box: turned by 45 degrees, its corners lie outside of that, and in the square all the same."""
    full = sample_of(np.ones((1, 20, 20, 3), np.float16), label=np.ones((20, 20, 3), np.uint8))
    meta = full.meta.model_copy(update={"original_shape": (40, 40, 3), "crop_box": ((10, 30), (10, 30), (0, 3))})
    sample = read_slice(Sample(full.image, full.brain, full.label, meta), 1, Plane.of(meta, 40))
    assert sample.image.shape == (1, 40, 40, 1) and sample.brain.sum() == 400

    class EighthTurn:
        random = staticmethod(lambda n: np.ones(n))
        uniform = staticmethod(lambda low, high, n=None: 0.0 if n is None else np.array([70.0, 70.0, 45.0]))

    turned = augment_geometry(sample, AugmentConfig(flip_prob=0, rotate_deg=180), EighthTurn, axial=True)
    assert abs(int(turned.brain.sum()) - 400) < 30 and turned.brain[20, 7] == 1


# bad samples


def test_subjects_that_cannot_be_decoded_are_left_out_when_training_opens(tmp_path, caplog):
    broken = {("a0", "image.npy"): b"broken", ("c1", "brain.npy"): b"broken"}
    folder = write_slices(tmp_path / "s", TARS, replace=broken)
    training = open_training(data_config(folder), 0, False)
    assert training.dropped == ["a0", "c1"] and caplog.text.count("subject left out: ") == 2
    assert not {"a0", "c1"} & {item.subject for item in training.order.epoch(0)}
    with pytest.raises(UserError, match=r"data\.max_bad_samples 1: more subjects than that cannot be read, the last one: .*subject c1"):
        open_training(data_config(folder, max_bad_samples=1), 0, False)
    with pytest.raises(UserError, match="subject a0 cannot be decoded .* leaves such subjects out"):
        open_training(data_config(folder, on_bad_sample="stop"), 0, False)


@pytest.fixture(scope="module")
def one_bad_slice(tmp_path_factory, shards):
    image = np.array(ShardStore(shards).subject("c2").image)
    image[2, 5, 5, 8] = np.inf
    return write_slices(tmp_path_factory.mktemp("bad") / "s", TARS, replace={("c2", "image.npy"): npy(image)})


def test_a_bad_slice_is_replaced_alike_for_all_worker_and_rank_counts_and_counted(one_bad_slice, caplog):
    config = data_config(one_bad_slice, max_bad_samples=9)
    order = open_training(config, 5, False).order
    steps = 2 * order.items_per_epoch // 4
    one = micro_batches(config, total_steps=steps)
    asked = [item for step in range(steps) for item in global_batch(order, step, 4)]
    assert caplog.text.count("c2 has values that are not finite") == sum((i.subject, i.slice_index) == ("c2", 8) for i in asked) in (1, 2)
    kept = [one[divmod(place, 4)].subject[0] == item.subject for place, item in enumerate(asked) if item.slice_index != 8]
    assert all(kept) and all(batch.image.isfinite().all() for batch in one.values())
    assert any(batch.subject == ["c2"] for batch in one.values())  # its other slices are fine
    ranks = [micro_batches(config.model_copy(update={"workers": 1}), world=2, rank=rank, total_steps=steps) for rank in (0, 1)]
    assert same(one, ranks[0] | ranks[1])
    with pytest.raises(UserError, match="subject c2 has values that are not finite"):
        micro_batches(config.model_copy(update={"on_bad_sample": "stop"}), total_steps=steps)


# one sequence per subject


def test_a_subject_shows_its_one_sequence_also_where_it_stands_in_for_another(tmp_path):
    nan = npy(np.full((4, *SHAPE), np.nan, np.float16))
    folder = write_slices(tmp_path / "s", TARS, replace={(key, "image.npy"): nan for key in ("a0", "a1", "c0", "d0")})
    config = data_config(folder, availability={"kind": "single"}, max_bad_samples=999)
    shown: dict = {}
    for batch in micro_batches(config, total_steps=40).values():
        shown.setdefault(batch.subject[0], set()).add(tuple(batch.available[0].tolist()))
    assert len(shown) == 5 and all(len(subsets) == 1 for subsets in shown.values())


# a whole run, its plan, its submission


def recipe_of(folder, tmp_path, **data):
    return {
        "name": "axial", "runs_dir": str(tmp_path / "runs"), "method": {"name": "toys.axial"},
        "data": {"shards": str(folder), "slices": {"size": SIZE}, "workers": 0, "augment": AUGMENT, "availability": {"kind": "single"}, **data},
        "train": {"global_batch": 4, "steps": 3, "precision": "fp32", "zero_stage": 0, "log_every": 1},
    }  # fmt: skip


def test_two_ranks_train_on_the_slices_that_the_first_one_found(two_ranks, tmp_path):
    folder = write_slices(tmp_path / "s", TARS, replace={("a0", "brain.npy"): b"broken"})
    (tmp_path / "axial.yaml").write_text(yaml.safe_dump(recipe_of(folder, tmp_path)))
    main, other = two_ranks.run("slice_ranks.py", "train", recipe=str(tmp_path / "axial.yaml"))
    assert len(main["said"]) == 1 and "subject a0 cannot be decoded" in main["said"][0] and other["said"] == []
    losses = [values["train/loss_student"] for _, values in main["curve"]]
    assert len(losses) == 3 and np.isfinite(losses).all()
    first, second = two_ranks.run("slice_ranks.py", "refused", recipe=str(tmp_path / "axial.yaml"))
    assert first.startswith("UserError: data.slices.min_brain 0.9: no slice") and second.startswith("FailedElsewhereError")


def test_a_plan_counts_slices_and_the_memory_of_theirs(shards, tmp_path):
    config = RunConfig.model_validate(recipe_of(shards, tmp_path))
    found = plan(config, 2)
    assert found.items == open_training(config.data, 0, False).order.items_per_epoch > 30
    (stage,) = found.stages
    assert stage.batch == SIZE * SIZE * (4 * 4 + 1 + 1) + 2 * 4 and stage.roles[0].activations > 0 and found.note is None


@pytest.mark.parametrize(("method", "data", "message"), [
    ("toys.axial", {"slices": None, "crop": [8, 8, 8]}, r"data\.slices: missing, and toys.axial takes axial slices; give their size in pixels"),
    ("toys.co_trained", {}, r"data\.crop: missing, and toys.co_trained takes volumes; give the training crop"),
])  # fmt: skip
def test_a_method_is_given_what_it_works_on_before_anything_is_read_or_queued(shards, tmp_path, method, data, message):
    recipe = {**recipe_of(shards, tmp_path, **data), "method": {"name": method}}
    (tmp_path / "axial.yaml").write_text(yaml.safe_dump(recipe))
    cluster = Cluster(ranks_per_node=2, cpus_per_task=1, timeout_min=60)
    for attempt in (
        lambda: plan(RunConfig.model_validate(recipe), 1),
        lambda: prepare(str(tmp_path / "axial.yaml"), "cpu", cluster, None, [], []),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_a_recipe_of_slices_can_be_submitted_and_is_not_measured_as_volumes(shards, tmp_path):
    (tmp_path / "axial.yaml").write_text(yaml.safe_dump(recipe_of(shards, tmp_path)))
    (run,) = prepare(str(tmp_path / "axial.yaml"), "cpu", Cluster(ranks_per_node=2, cpus_per_task=1, timeout_min=60), None, [], []).runs
    assert run.data.slices.size == SIZE
    with pytest.raises(UserError, match="bench cost: .*axial.yaml gives no data.crop, and costs are measured for volumes"):
        bench_cost([str(tmp_path / "axial.yaml")], [], "flair", 1, lambda line: None)
