"""The node-local cache of tars: its limit, what it evicts, and several processes at it."""

import fcntl
import mmap
import multiprocessing
import os
import threading

import pytest
from held_folder import FailingFolder, HeldFolder
from tiny_shards import write_set

from mstkd.data.remote import LocalFolder
from mstkd.data.staging import StagingCache
from mstkd.errors import UserError
from mstkd.shards.spec import read_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", [[f"s{i}"] for i in range(6)])


@pytest.fixture(scope="module")
def entries(folder):
    return read_index(folder).shards


def cache_of(tmp_path, entries, tars):
    return StagingCache(tmp_path / "cache", tars * entries[0].bytes / 2**30)


def staged(tmp_path):
    return sorted(path.name.rpartition("-")[2] for path in (tmp_path / "cache").glob("*.tar"))


def tar(number):
    return f"{number:06d}.tar"


def test_the_limit_holds_and_a_tar_in_use_stays(folder, entries, tmp_path):
    cache, source = cache_of(tmp_path, entries, 3), LocalFolder(folder)
    with cache.open(source, entries[0]) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for entry in entries[1:]:
        cache.open(source, entry).close()
        assert len(staged(tmp_path)) <= 3
    assert staged(tmp_path) == [tar(0), tar(4), tar(5)]  # the oldest, but mapped
    mapped.close()
    cache.open(source, entries[1]).close()
    assert tar(0) not in staged(tmp_path)


def test_when_all_are_in_use_the_oldest_goes_and_can_still_be_read(folder, entries, tmp_path):
    cache, source = cache_of(tmp_path, entries, 2), LocalFolder(folder)
    files = [cache.open(source, entry) for entry in entries]
    assert staged(tmp_path) == [tar(4), tar(5)]
    for number, file in enumerate(files):
        assert file.read() == (folder / entries[number].file).read_bytes()
        file.close()


def test_a_copy_that_was_cut_is_fetched_again(folder, entries, tmp_path):
    cache, source = cache_of(tmp_path, entries, 2), LocalFolder(folder)
    cache.open(source, entries[0]).close()
    (copy,) = (tmp_path / "cache").glob("*.tar")
    os.truncate(copy, 100)
    with cache.open(source, entries[0]) as file:
        assert file.read() == (folder / entries[0].file).read_bytes()


def opened_in_thread(cache, source, entry):
    thread = threading.Thread(target=lambda: cache.open(source, entry).close())
    thread.start()
    return thread


def test_two_tars_are_brought_at_a_time_if_there_is_room_for_both(folder, entries, tmp_path):
    slow = HeldFolder(folder)
    thread = opened_in_thread(cache_of(tmp_path, entries, 2), slow, entries[0])
    assert slow.begun.wait(60)
    cache_of(tmp_path, entries, 2).open(LocalFolder(folder), entries[1]).close()  # does not wait for the other
    assert staged(tmp_path) == [tar(1)]
    slow.may_end.set()
    thread.join()
    assert staged(tmp_path) == [tar(0), tar(1)]


def test_without_room_for_both_the_second_waits_and_the_limit_holds(folder, entries, tmp_path):
    slow = HeldFolder(folder)
    first = opened_in_thread(cache_of(tmp_path, entries, 1), slow, entries[0])
    assert slow.begun.wait(60)
    second = opened_in_thread(cache_of(tmp_path, entries, 1), LocalFolder(folder), entries[1])
    second.join(0.2)
    assert second.is_alive() and staged(tmp_path) == [] and len(list((tmp_path / "cache").glob("*.part"))) == 1
    slow.may_end.set()
    first.join()
    second.join()
    assert staged(tmp_path) == [tar(1)]


def test_who_waited_in_vain_brings_it_himself(folder, entries, tmp_path):
    slow, failed = FailingFolder(folder), []

    def open_failing():
        try:
            cache_of(tmp_path, entries, 2).open(slow, entries[0])
        except UserError as error:
            failed.append(str(error))

    first = threading.Thread(target=open_failing)
    first.start()
    assert slow.begun.wait(60)
    second = opened_in_thread(cache_of(tmp_path, entries, 2), LocalFolder(folder), entries[0])
    slow.may_end.set()
    first.join()
    second.join()
    assert failed == ["out of reach"] and staged(tmp_path) == [tar(0)]


def _open_all(folder, cache_dir, gib, order, results):
    entries = read_index(folder).shards
    sound = True
    for number in order:
        with StagingCache(cache_dir, gib).open(LocalFolder(folder), entries[number]) as file:
            sound &= file.read() == (folder / entries[number].file).read_bytes()
    results.put(sound)


def test_processes_in_different_orders_read_the_right_bytes_within_the_limit(folder, entries, tmp_path):
    context = multiprocessing.get_context("fork")
    results, gib = context.Queue(), 2 * entries[0].bytes / 2**30
    (tmp_path / "cache").mkdir()
    orders = [[(start + step * i) % 6 for i in range(8)] for start, step in ((0, 1), (3, 1), (5, 5), (2, 5))]
    processes = [context.Process(target=_open_all, args=(folder, tmp_path / "cache", gib, order, results)) for order in orders]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert len(staged(tmp_path)) <= 2 and not list((tmp_path / "cache").glob("*.part"))


def test_the_part_of_a_dead_process_is_removed_and_that_of_a_live_one_is_not(folder, entries, tmp_path):
    cache = cache_of(tmp_path, entries, 4)
    dead, live = (tmp_path / "cache" / f"{name}.part" for name in ("dead", "live"))
    dead.write_bytes(b"x")
    with open(live, "wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        cache.open(LocalFolder(folder), entries[0]).close()
        assert live.exists() and not dead.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_with_the_figures(folder, entries, tmp_path):
    # more than any disk has: the file system refuses it as it would refuse a tar on a full one
    huge = entries[0].model_copy(update={"bytes": 2**52})
    with pytest.raises(UserError, match=r"cache: (disk full: tiny-000000.tar needs 4.19e\+06 GiB, [\d.e+]+ GiB are free|cannot be written to)") as error:
        StagingCache(tmp_path / "cache", 2**40).open(LocalFolder(folder), huge)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*.part"))


def test_a_cache_that_cannot_be_made_or_is_too_small_is_said(folder, entries, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache_dir .*file/cache: cannot be created"):
        StagingCache(tmp_path / "file" / "cache", 1)
    with pytest.raises(UserError, match="data.cache_gib .*smaller than tiny-000000.tar"):
        cache_of(tmp_path, entries, 0.5).open(LocalFolder(folder), entries[0])
