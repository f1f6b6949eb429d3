"""Tars staged before they are read: in which order, how far, and what becomes of errors, limits, locks and threads."""

import itertools
import multiprocessing
import threading

import pytest
from faulty_server import serving
from held_folder import FailingFolder
from test_data_loader import data_config, loader_of, micro_batches, same
from tiny_shards import TARS, write_set

from mstkd.data.ahead import THREAD, staged_ahead
from mstkd.data.remote import LocalFolder
from mstkd.data.sample import Item
from mstkd.data.staging import CopyStopped, NoRoom, StagingCache
from mstkd.data.store import ShardStore
from mstkd.data.training import open_training
from mstkd.errors import UserError
from mstkd.shards.spec import read_index

COUNT = 6  # tars of two subjects each, all of one size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", [[f"{tar}a", f"{tar}b"] for tar in range(COUNT)])


@pytest.fixture
def server(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_thread_is_left(server):
    yield
    for thread in stagers():
        thread.join(30)
        assert not thread.is_alive()


def stagers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def name(tar):
    return f"tiny-{tar:06d}.tar"


def store_of(server, cache, tars=COUNT):
    """A store with room for `tars` tars in its cache."""
    return ShardStore(server.url, cache, tars * (server.folder / name(0)).stat().st_size / 2**30)


def ahead(store, tars=range(COUNT), most_tars=COUNT, subjects="ab"):
    """The stream of the first, then the second subject of each tar."""
    return staged_ahead(iter([Item(0, 0, f"{tar}{subject}") for tar in tars for subject in subjects]), [store], most_tars)


def asked(server):
    return {path for path, count in server.requests.items() if path.endswith(".tar") and count}


def staged(cache):
    return {path.name.partition("-")[2] for path in cache.glob("*.tar")}


def test_the_next_tar_is_asked_for_before_a_subject_of_it(server, tmp_path):
    store = store_of(server, tmp_path)
    for place, item in enumerate(ahead(store, most_tars=2)):
        store.subject(item.subject)
        if place // 2 + 1 < COUNT:
            server.await_request(name(place // 2 + 1))
    assert place == 2 * COUNT - 1 and server.requests == {"index.json": 1, "splits.json": 1, **{name(tar): 1 for tar in range(COUNT)}}


def test_no_more_tars_are_brought_than_is_said(server, tmp_path):
    store = store_of(server, tmp_path)
    items = ahead(store, most_tars=3)
    for tar in (0, 0, 1):
        store.subject(next(items).subject)
        server.await_request(name(tar + 2))
        (thread,) = stagers()
        thread.join(0.2)  # time to go too far
        assert asked(server) == {name(other) for other in range(tar + 3)}
    items.close()


def test_training_looks_ahead_and_not_beyond_its_last_step(tmp_path):
    with serving(write_set(tmp_path / "set", TARS)) as server:
        config = data_config((server.url, 1), cache_dir=str(tmp_path / "cache"), shuffle_window=1)
        training = open_training(config, 5, False)
        visits = [training.stores[0].tar_of(item.subject).file for item in training.order.epoch(0)]
        tars = list(dict.fromkeys(visits))
        count = visits.index(tars[2])
        steps = iter(loader_of(config, global_batch=1, total_steps=count))  # all of the first two tars
        next(steps)
        server.await_request(tars[1])
        (thread,) = stagers()
        thread.join(0.2)  # time to go too far
        assert len(list(steps)) == count - 1 and asked(server) == set(tars[:2])


def test_an_error_ahead_is_heard_when_its_tar_is_read(server, tmp_path):
    server.faults[name(1)] = [404] * 9
    store = store_of(server, tmp_path)
    items = ahead(store)
    store.subject(next(items).subject)
    server.await_request(name(2))  # so the thread is over it
    store.subject(next(items).subject)
    key = next(items).subject
    with pytest.raises(UserError, match=rf"{server.url}/{name(1)}: named in index.json, but not there"):
        store.subject(key)
    items.close()


def test_an_error_ahead_that_passes_is_none(server, tmp_path, caplog):
    caplog.set_level("INFO", "mstkd")
    server.faults[name(1)] = ["wrong"]
    store = store_of(server, tmp_path)
    items = ahead(store)
    store.subject(next(items).subject)
    server.await_request(name(2))
    assert [store.subject(item.subject).meta.subject for item in items] == [f"{tar}{s}" for tar in range(COUNT) for s in "ab"][1:]
    assert server.requests[name(1)] == 2 and f"not staged ahead, its reader will try again: {server.url}/{name(1)}: its sha256" in caplog.text


def test_an_error_of_a_tar_that_nobody_reads_is_none(server, tmp_path):
    server.faults[name(1)] = [404] * 9
    store = store_of(server, tmp_path)
    items = ahead(store)
    store.subject(next(items).subject)
    server.await_request(name(2))
    items.close()


@pytest.mark.parametrize("tars", [2, 3])
def test_the_limit_holds_and_each_tar_comes_once(server, tmp_path, tars):
    store = store_of(server, tmp_path, tars)
    for place, item in enumerate(ahead(store, subjects="a")):
        store.subject(item.subject)
        for later in range(place + 1, min(place + tars, COUNT)):
            server.await_request(name(later))
        assert len([*tmp_path.glob("*.tar"), *tmp_path.glob("*.part")]) <= tars
    assert set(server.requests.values()) == {1}


def test_two_epochs_of_a_set_larger_than_the_cache(server, tmp_path):
    store = store_of(server, tmp_path, 2)
    stream = [Item(epoch, 0, f"{tar}a") for epoch in range(2) for tar in range(COUNT)]
    for place, item in enumerate(staged_ahead(iter(stream), [store], COUNT)):
        store.subject(item.subject)
        if place + 1 < len(stream):
            server.await_request(name((place + 1) % COUNT), times=(place + 1) // COUNT + 1)
    assert {server.requests[name(tar)] for tar in range(COUNT)} == {2}


def test_ahead_no_copy_in_use_is_evicted(folder, tmp_path):
    entries, source = read_index(folder).shards, LocalFolder(folder)
    cache = StagingCache(tmp_path, 2 * entries[0].bytes / 2**30)
    first, second = (cache.open(source, entry) for entry in entries[:2])
    with pytest.raises(NoRoom):
        cache.open_ahead(source, entries[2], lambda: False)
    assert staged(tmp_path) == {name(0), name(1)}
    second.close()
    cache.open_ahead(source, entries[2], lambda: False).close()
    assert staged(tmp_path) == {name(0), name(2)}
    first.close()


def test_without_room_it_waits_until_there_is_some(server, tmp_path):
    store = store_of(server, tmp_path, 3)
    others = [store.stage(tar, lambda: False) for tar in store.index.shards[4:]]
    items = ahead(store, tars=range(4), most_tars=2)
    store.subject(next(items).subject)
    (thread,) = stagers()
    thread.join(0.2)  # time to evict what others use
    assert staged(tmp_path) == {name(0), name(4), name(5)} and name(1) not in asked(server)
    for other in others:
        other.close()
    next(items)  # still of the first tar
    server.await_request(name(1))
    items.close()


def test_what_was_brought_stays_until_it_is_read(server, tmp_path):
    store, other = store_of(server, tmp_path, 3), store_of(server, tmp_path, 3)
    items = ahead(store, most_tars=2)
    store.subject(next(items).subject)
    other.stage(other.index.shards[1], lambda: False).close()  # there now
    other.subject("5a")
    other.release(other.tar_of("5a"))
    other.subject("4a")  # the fourth: one has to go, and the oldest that is idle is not the second
    assert staged(tmp_path) == {name(0), name(1), name(4)}
    items.close()


def test_it_looks_no_further_than_the_next_epoch(server, tmp_path):
    asked_for = []

    def endless():
        for epoch in itertools.count():
            assert epoch < 9
            for tar in range(2):
                asked_for.append(epoch)
                yield Item(epoch, 0, f"{tar}a")

    items = staged_ahead(endless(), [store_of(server, tmp_path)], COUNT)
    next(items)
    assert asked_for == [0, 0, 1, 1, 2]  # the last one is looked at and waits
    items.close()


def test_a_stream_that_is_closed_leaves_no_thread_no_part_and_no_lock(server, tmp_path):
    server.gates[name(1)] = threading.Event()
    store = store_of(server, tmp_path, 2)
    items = ahead(store)
    store.subject(next(items).subject)
    server.await_request(name(1))
    (thread,) = stagers()
    items.close()
    server.gates[name(1)].set()
    thread.join(30)
    assert not thread.is_alive() and staged(tmp_path) == {name(0)} and not list(tmp_path.glob("*.part"))
    store.release(store.index.shards[0])
    for copy in [store.stage(tar, lambda: False) for tar in store.index.shards[1:3]]:  # the thread holds no copy any more
        copy.close()


def test_a_copy_no_longer_wanted_is_given_up(folder, tmp_path):
    with pytest.raises(CopyStopped):
        StagingCache(tmp_path, 1).open_ahead(LocalFolder(folder), read_index(folder).shards[0], lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_sets_that_are_not_staged_start_no_thread(folder):
    store = ShardStore(folder)
    for item in ahead(store):
        store.subject(item.subject)
        assert not stagers()


def _read_all(url, cache, results):
    store = ShardStore(url, cache)
    results.put([store.subject(item.subject).meta.subject for item in ahead(store)])


def test_processes_that_look_ahead_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_all, args=(server.url, tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[f"{tar}{s}" for tar in range(COUNT) for s in "ab"]] * 3
    for process in processes:
        process.join()
    assert {server.requests[name(tar)] for tar in range(COUNT)} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_a_thread_in_each_worker(folder, tmp_path, workers):
    one_tar_gib = (folder / name(0)).stat().st_size / 2**30
    config = data_config(folder, cache_dir=str(tmp_path), cache_gib=4 * one_tar_gib, workers=workers)
    assert same(micro_batches(config, total_steps=9), micro_batches(data_config(folder), total_steps=9))
    assert not list(tmp_path.glob("*.part"))


def test_a_child_forked_during_a_download_keeps_no_lock(folder, tmp_path):
    entry, source = read_index(folder).shards[0], FailingFolder(folder)
    failing = threading.Thread(target=lambda: pytest.raises(UserError, StagingCache(tmp_path, 1).open, source, entry))
    failing.start()
    assert source.begun.wait(60)
    waiting = threading.Thread(target=lambda: StagingCache(tmp_path, 1).open(LocalFolder(folder), entry).close())
    waiting.start()
    context = multiprocessing.get_context("fork")
    ends = context.Event()
    child = context.Process(target=ends.wait)  # it inherits the open part
    child.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    source.may_end.set()
    failing.join(30)
    waiting.join(30)
    came, child_lived = not waiting.is_alive(), child.is_alive()
    ends.set()
    child.join()
    waiting.join()
    assert came and child_lived and staged(tmp_path) == {name(0)}
