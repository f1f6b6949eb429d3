"""The training loader on real tars: exact across ranks, workers and resumes; bad samples; what a recipe can get wrong."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from global_batches import global_batch
from tiny_shards import SEQUENCES, SHAPE, TARS, npy, write_set

from mstkd.config import DataConfig, IntensityConfig, TrainConfig
from mstkd.data.crop import Foreground
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader
from mstkd.data.sample import Item, Sample, item_rng
from mstkd.data.store import ShardStore
from mstkd.data.training import open_training
from mstkd.data.workers import WorkerError
from mstkd.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", TARS, test=("b1",), present={"c0": ("flair", "t2")})


def data_config(*folders, **fields):
    augment = {"flip_prob": 0.5, "rotate_deg": 20, "zoom": 0.1, "intensity_scale": 0.1, "noise_std": 0.05}
    sets = [{"path": str(f)} if isinstance(f, Path) else {"path": str(f[0]), "repeat": f[1]} for f in folders]
    base = {"shards": sets, "crop": (8, 8, 8), "foreground_share": 0.5, "augment": augment, "workers": 0, "shuffle_window": 2}
    return DataConfig(**{**base, **fields})


def loader_of(config, seed=5, complete_only=False, kind="percentile", **share):
    share = {"global_batch": 4, "micro_batch": 1, "total_steps": 5, **share}
    training = open_training(config, seed, complete_only)
    return TrainLoader(training, config, Intensity(IntensityConfig(kind=kind)), **share)


def micro_batches(config, **options):
    """{(step, j): Batch} of one loader."""
    start = options.get("start_step", 0)
    return {(start + s, j): batch for s, step in enumerate(loader_of(config, **options)) for j, batch in step}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[k].subject == other[k].subject
        and one[k].hidden_value == other[k].hidden_value
        and all(torch.equal(v, getattr(other[k], name)) for name, v in vars(one[k]).items() if isinstance(v, torch.Tensor))
        for k in one
    )


@pytest.fixture(scope="module")
def reference(shards):
    return micro_batches(data_config(shards))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_batches_are_bitwise_equal_for_every_rank_and_worker_count(shards, reference, world, workers):
    joined = {}
    for rank in range(world):
        own = micro_batches(data_config(shards, workers=workers), world=world, rank=rank)
        assert {j for _, j in own} == set(range(rank, 4, world))
        joined |= own
    assert same(joined, reference)


@pytest.mark.parametrize("crops", ["fresh", "fixed"])
def test_fixed_crops_show_an_item_alike_in_every_epoch_and_hide_other_sequences(shards, crops):
    seen: dict[str, list] = {}
    for batch in micro_batches(data_config((shards, 2), crops=crops), total_steps=16).values():  # 16 items: four epochs
        seen.setdefault(batch.subject[0], []).append(batch)
    for batches in seen.values():
        images = {batch.image.numpy().tobytes() for batch in batches}
        assert len(batches) == 8 and len(images) == (2 if crops == "fixed" else 8)  # one per repeat
        assert len({tuple(batch.available[0].tolist()) for batch in batches}) > 1


def test_a_bad_sample_is_replaced_alike_in_every_epoch_of_fixed_crops(tmp_path):
    folder = write_set(tmp_path / "bad", TARS, replace={("a0", "image.npy"): b"broken"})
    config = data_config(folder, crops="fixed", max_bad_samples=99)
    epochs = [batch for _, batch in sorted(micro_batches(config, total_steps=27, global_batch=1).items())]  # nine items: three epochs
    images = [sorted(batch.image.numpy().tobytes() for batch in epochs[start : start + 9]) for start in (0, 9, 18)]
    assert images[0] == images[1] == images[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_on_another_rank_count_continues_exactly(shards, reference, workers):
    joined = {}
    for rank in range(2):
        joined |= micro_batches(data_config(shards, workers=workers), start_step=3, world=2, rank=rank)
    assert same(joined, {k: v for k, v in reference.items() if k[0] >= 3})


def test_micro_batches_of_two_hold_the_same_samples(shards, reference):
    twos = micro_batches(data_config(shards, workers=2), micro_batch=2)
    for (step, j), batch in twos.items():
        ones = [reference[step, 2 * j], reference[step, 2 * j + 1]]
        assert torch.equal(batch.image, torch.cat([one.image for one in ones]))
        assert batch.subject == [one.subject[0] for one in ones]


def test_neither_global_seeds_nor_earlier_draws_matter(shards, reference):
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.get_rng_state()
    assert same(micro_batches(data_config(shards, workers=2)), reference)
    assert torch.equal(torch.get_rng_state(), before)  # and the loader takes none from the training process
    assert not same(micro_batches(data_config(shards), seed=6), reference)


def test_workers_outlive_the_signals_that_ask_a_job_to_stop(shards, reference):
    others = multiprocessing.active_children()
    steps = iter(loader_of(data_config(shards, workers=2)))
    found = {(0, j): batch for j, batch in next(steps)}
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        for worker in workers:
            os.kill(worker.pid, number)
    found |= {(step, j): batch for step, batches in enumerate(steps, start=1) for j, batch in batches}
    assert same(found, reference)
    assert not any(worker.is_alive() for worker in workers)  # and they end with the loader


def test_shapes_types_and_epochs_without_padding_or_dropping(shards, reference):
    batch = reference[0, 0]
    assert batch.image.shape == (1, 4, 8, 8, 8) and batch.image.dtype == torch.float32
    assert batch.brain.shape == (1, 8, 8, 8) and batch.brain.dtype == torch.bool
    assert batch.label.shape == (1, 8, 8, 8) and batch.label.dtype == torch.uint8
    assert batch.present.shape == batch.available.shape == (1, 4) and batch.available.dtype == torch.bool
    stream = [reference[step, j].subject[0] for step in range(5) for j in range(4)]
    trained = sorted(key for tar in TARS for key in tar if key != "b1")
    assert sorted(stream[:8]) == trained == sorted(stream[8:16])  # 8 items; 4 a step; the test subject never


def test_an_absent_sequence_is_not_present_never_available_and_filled(shards, reference):
    found = [b for b in reference.values() if b.subject == ["c0"]]
    assert found
    for batch in found:
        assert batch.present.tolist() == [[True, False, False, True]]
        assert (batch.image[:, 1:3] == batch.hidden_value).all()
    for batch in reference.values():
        assert batch.available.any() and not (batch.available & ~batch.present).any()


def test_complete_only_drops_counts_and_logs(shards, caplog):
    training = open_training(data_config(shards), 0, complete_only=True)
    assert training.dropped == ["c0"] and training.order.items_per_epoch == 7
    assert "1 training subjects dropped" in caplog.text


def test_unlabelled_subjects_of_a_labelled_set_are_dropped(tmp_path):
    folder = write_set(tmp_path / "s", TARS, unlabelled=("a0",))
    assert open_training(data_config(folder), 0, complete_only=False).dropped == ["a0"]


def test_where_nobody_can_be_trained_on_the_reason_is_said(tmp_path):
    unlabelled = write_set(tmp_path / "s", TARS, unlabelled=[key for tar in TARS for key in tar])
    with pytest.raises(UserError, match=r"each of the \d+ training subjects lacks the label$"):
        open_training(data_config(unlabelled), 0, complete_only=False)
    with pytest.raises(UserError, match=r"lacks a sequence or the label; this method trains on complete subjects, monai_network"):
        open_training(data_config(unlabelled), 0, complete_only=True)


def test_a_set_without_labels_gives_batches_without_label(tmp_path):
    folder = write_set(tmp_path / "s", TARS, unlabelled=[key for tar in TARS for key in tar], label_scheme=None)
    assert all(batch.label is None for batch in micro_batches(data_config(folder), total_steps=1).values())


def test_mixed_sets_repeat_as_asked_and_may_share_keys(shards, tmp_path):
    other = write_set(tmp_path / "other", [["a0"], ["x0"]])
    training = open_training(data_config(shards, (other, 3)), 0, complete_only=False)
    items = training.order.epoch(0)
    assert len(items) == 8 + 6 == len(set(items))
    assert sum(item.source == 1 and item.subject == "a0" for item in items) == 3


@pytest.mark.parametrize("fields", [{"sequences": SEQUENCES[::-1]}, {"label_scheme": "brats2023"}])
def test_mixed_sets_must_agree(shards, tmp_path, fields):
    other = write_set(tmp_path / "other", [["x0"]], **fields)
    with pytest.raises(UserError, match="mixed sets must agree"):
        open_training(data_config(shards, other), 0, False)


@pytest.mark.parametrize("data", [b"garbage", npy(np.full((4, *SHAPE), np.nan, np.float16))])
def test_a_bad_sample_is_replaced_alike_for_all_worker_and_rank_counts_and_counted(tmp_path, caplog, data):
    folder = write_set(tmp_path / "s", TARS, replace={("a0", "image.npy"): data})
    loader = loader_of(data_config(folder))
    one = {(s, j): batch for s, step in enumerate(loader) for j, batch in step}
    assert len(one) == 20 and not any("a0" in batch.subject for batch in one.values())
    order = open_training(data_config(folder), 5, False).order
    asked = [item.subject for step in range(5) for item in global_batch(order, step, 4)]
    # a substitute drawn for a0 may be a0 again, so the count may exceed the number of times it was asked for
    assert asked.count("a0") <= loader.bad_samples == caplog.text.count("sample skipped and replaced") <= 10
    kept = [one[divmod(i, 4)].subject[0] == key for i, key in enumerate(asked) if key != "a0"]
    assert all(kept)  # the others stay where they were
    ranks = [micro_batches(data_config(folder, workers=2), world=2, rank=r) for r in (0, 1)]
    assert same(one, ranks[0] | ranks[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [["a0"], [key for tar in TARS for key in tar]])
def test_more_bad_samples_than_allowed_stop_the_run_in_one_line(tmp_path, workers, broken):
    folder = write_set(tmp_path / "s", TARS, replace={(key, "image.npy"): b"garbage" for key in broken})
    with pytest.raises(UserError, match="data.max_bad_samples 1: .*cannot be decoded") as error:
        list(loader_of(data_config(folder, max_bad_samples=1, workers=workers), total_steps=20))
    assert "\n" not in str(error.value)


def test_batching_that_does_not_divide_names_the_rank_counts_that_work():
    assert TrainConfig(global_batch=8, micro_batch=2, steps=1).accumulation(2) == 2
    assert TrainConfig(global_batch=6, steps=1).accumulation(3) == 2
    with pytest.raises(UserError) as error:
        TrainConfig(global_batch=8, steps=1).accumulation(3)
    assert str(error.value) == "train.global_batch 8 with micro_batch 1 runs on 1, 2, 4 or 8 ranks, not 3"
    with pytest.raises(UserError, match="runs on 1 rank, not 2"):
        TrainConfig(global_batch=4, micro_batch=4, steps=1).accumulation(2)


def test_staged_tars_serve_the_same_batches_within_the_limit(shards, reference, tmp_path):
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    cache = tmp_path / "cache"
    config = data_config(shards, cache_dir=str(cache), cache_gib=2 * largest / 2**30, workers=2)
    assert same(micro_batches(config), reference)
    staged = list(cache.glob("*.tar"))
    assert staged and sum(path.stat().st_size for path in staged) <= 2 * largest
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [b"garbage", npy(np.full((4, *SHAPE), np.inf, np.float16))])
def test_on_bad_sample_stop_names_tar_and_subject(tmp_path, workers, data):
    folder = write_set(tmp_path / "s", TARS, replace={("b1", "image.npy"): data})
    with pytest.raises(UserError, match=r"tiny-000001\.tar: subject b1 .*; or data\.on_bad_sample=skip") as error:
        list(loader_of(data_config(folder, workers=workers, on_bad_sample="stop")))
    assert "\n" not in str(error.value)


class Broken(Intensity):
    """Fails as no check foresaw, at the third sample."""

    def apply(self, image, brain, meta, sequences):
        if meta.subject == "c1":
            raise ZeroDivisionError("by a colleague")
        return super().apply(image, brain, meta, sequences)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unforeseen_failure_in_a_worker_surfaces_as_what_it_is(shards, workers, caplog):
    config = data_config(shards, workers=workers)
    training = open_training(config, 5, False)
    loader = TrainLoader(training, config, Broken(IntensityConfig()), global_batch=4, micro_batch=1, total_steps=5)
    with pytest.raises(WorkerError, match=rf"loader.*: ZeroDivisionError: by a colleague \(at subject c1 of {shards}\)") as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert "Traceback" in caplog.text and "in apply" in caplog.text


def one_worker_of(steps):
    others = multiprocessing.active_children()
    next(steps)
    return [child for child in multiprocessing.active_children() if child not in others][0]


@pytest.mark.parametrize(
    "number, message",
    [
        (signal.SIGKILL, r"was ended by SIGKILL, .* memory runs out: [\d.]+ of [\d.]+ GiB are free now"),
        (signal.SIGBUS, r"was ended by SIGBUS: no tar in use has changed, so /dev/shm has \d+ of \d+ MiB free"),
        (signal.SIGSEGV, r"was ended by SIGSEGV; data.workers=0"),
    ],
)
def test_a_worker_that_is_killed_is_said_where_the_batch_is_awaited_and_nowhere_else(shards, number, message):
    steps = iter(loader_of(data_config(shards, workers=2), total_steps=500))
    worker = one_worker_of(steps)
    os.kill(worker.pid, number)
    worker.join()
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # PyTorch's handler would raise in the middle of an update
    with pytest.raises(WorkerError, match=rf"loader process \d of 2 {message}") as error:
        list(steps)
    assert "\n" not in str(error.value)


def test_a_tar_cut_while_it_is_mapped_is_named(tmp_path):
    folder = write_set(tmp_path / "s", [[f"s{i}" for i in range(40)]])
    steps = iter(loader_of(data_config(folder, workers=1), total_steps=500))
    next(steps)
    tar = folder / "tiny-000000.tar"
    size = tar.stat().st_size
    os.truncate(tar, 4096)  # whatever lies behind is a bus error in a map, unless it is noticed before
    with pytest.raises((UserError, WorkerError), match=rf"tiny-000000\.tar.*: (4096 of {size} bytes|.*4096 bytes)") as error:
        list(steps)
    assert "\n" not in str(error.value)


SMALL_SHARED_MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_data_loader import data_config, loader_of
try:
    list(loader_of(data_config(Path(sys.argv[1]), workers=2, crop=(64, 64, 64))))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_too_little_shared_memory_is_said_instead_of_waiting_for_ever(shards):
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("no /dev/shm of its own to be had here: unshare and mount are not permitted")
    script = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    command = [*own, "sh", "-c", script, "sh", sys.executable, "-c", SMALL_SHARED_MEMORY, str(shards), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "UserError data.workers: 4 MiB of a batch do not fit into shared memory: /dev/shm has 2 of 2 MiB free" in said


def test_a_remembered_foreground_changes_no_crop(shards):
    label = np.zeros((20, 18, 16), np.uint8)
    label[np.random.default_rng(0).random(label.shape) < 0.01] = 4
    remembered = Foreground(subjects=2)
    meta = ShardStore(shards).subject("a0").meta
    for seed in range(300):
        sample = Sample(np.zeros((1, *label.shape), np.float16), label, label, meta.model_copy(update={"subject": f"s{seed % 4}"}))
        expected = np.unravel_index(np.flatnonzero(label)[item_rng(seed, Item(0, 0, "s"), "x").integers(np.count_nonzero(label))], label.shape)
        assert remembered.draw(sample, item_rng(seed, Item(0, 0, "s"), "x")) == tuple(map(int, expected))


# sha256 over all that training sees of 20 micro-batches: a change of any draw, crop or normalisation breaks running runs
PINNED = "dc656965e13a7fb29a8efff3f98d40354af18f88be27f61ab96c3dd5f9d56fbc"


def digest_of(found):
    digest = hashlib.sha256()
    for key in sorted(found):
        batch = found[key]
        for name in ("image", "brain", "present", "available", "label"):
            digest.update(getattr(batch, name).numpy().tobytes())
    return digest.hexdigest()


def test_the_batches_are_pinned(shards):
    config = data_config(shards, augment={"flip_prob": 0.5})
    assert digest_of(micro_batches(config, kind="zscore")) == PINNED
