"""The shard store: exact views on the tars, nothing unpickled, one-line errors, and the node-local cache."""

import functools
import hashlib
import io
import json
import pickle
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tiny_shards import SHAPE, TARS, members_of, npy, write_set

from mstkd.data.store import BadSample, ShardStore
from mstkd.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", TARS)


def test_a_subject_is_a_read_only_view_on_the_tar(shards):
    sample = ShardStore(shards).subject("b0")
    expected = members_of("b0")
    np.testing.assert_array_equal(sample.image, np.load(io.BytesIO(expected["image.npy"])))
    np.testing.assert_array_equal(sample.label, np.load(io.BytesIO(expected["label.npy"])))
    assert sample.image.dtype == np.float16 and not sample.image.flags.writeable and not sample.image.flags.owndata
    assert sample.meta.subject == "b0"


def test_arrays_outlive_the_store_and_its_limit_of_open_tars(tmp_path):
    folder = write_set(tmp_path / "many", [[f"s{i}"] for i in range(20)])
    store = ShardStore(folder)
    kept = {key: store.subject(key) for key in store.subjects}
    del store
    for key, sample in kept.items():
        np.testing.assert_array_equal(sample.image, np.load(io.BytesIO(members_of(key)["image.npy"])))


def test_a_store_travels_to_a_worker_without_its_maps(shards):
    store = ShardStore(shards)
    store.subject("a0")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).subject("a0").image, store.subject("a0").image)


def test_the_least_recently_used_tar_leaves_the_cache(tmp_path):
    folder = write_set(tmp_path / "s", [["a"], ["b"], ["c"]])
    size = (folder / "tiny-000000.tar").stat().st_size
    fresh = lambda: ShardStore(folder, tmp_path / "cache", 2.5 * size / 2**30)  # noqa: E731
    for key in ("a", "b", "a", "c"):  # a is used again before c needs room
        fresh().subject(key)
    assert sorted(path.name.split("-")[-1] for path in (tmp_path / "cache").glob("*.tar")) == ["000000.tar", "000002.tar"]


def test_staging_is_done_once_and_checks_what_it_copied(tmp_path):
    folder = write_set(tmp_path / "s", [["a"], ["b"]])
    ShardStore(folder, tmp_path / "cache").subject("a")
    first = next((tmp_path / "cache").glob("*.tar")).stat().st_ino
    store = ShardStore(folder, tmp_path / "cache")
    assert store.subject("a").image.shape == (4, *SHAPE)
    assert [p.stat().st_ino for p in (tmp_path / "cache").glob("*.tar")] == [first]
    tar = folder / "tiny-000001.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match="tiny-000001.tar: its sha256 differs from index.json"):
        store.subject("b")
    with pytest.raises(UserError, match="data.cache_gib 1e-06: smaller than"):
        ShardStore(folder, tmp_path / "small", 1e-6).subject("a")


def test_what_the_builder_writes_is_what_the_store_reads(phantom_shards):
    store = ShardStore(phantom_shards)
    assert len(store.subjects) == 12
    for shard in store.index.shards:
        with tarfile.open(phantom_shards / shard.file) as tar:
            for entry in shard.subjects:
                sample = store.subject(entry.subject)
                for member, array in (("image", sample.image), ("brain", sample.brain), ("label", sample.label)):
                    data = tar.extractfile(f"{entry.subject}.{member}.npy").read()
                    np.testing.assert_array_equal(array, np.load(io.BytesIO(data)))


def test_missing_folder_file_fold_and_subject_are_one_line_errors(shards, tmp_path):
    for action, words in (
        (lambda: ShardStore(tmp_path / "none"), "none: no such folder"),
        (lambda: ShardStore(tmp_path), "index.json is missing"),
        (lambda: ShardStore(shards).fold(1), "data.fold 1: .*folds 0 to 0"),
        (lambda: ShardStore(shards).subject("nobody"), "no subject 'nobody'"),
    ):
        with pytest.raises(UserError, match=words) as error:
            action()
        assert "\n" not in str(error.value)


def test_a_malformed_index_names_file_and_key(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    (folder / "index.json").write_text(json.dumps({**json.loads((folder / "index.json").read_text()), "version": 2}))
    with pytest.raises(UserError, match="index.json: version"):
        ShardStore(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json: cannot be read"):
        ShardStore(folder)


def test_a_truncated_or_missing_tar_is_found_when_the_set_is_opened(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    tar = folder / "tiny-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])  # cut between members, which tar readers do not notice
    with pytest.raises(UserError, match="tiny-000001.tar: truncated"):
        ShardStore(folder)
    tar.unlink()
    with pytest.raises(UserError, match="tiny-000001.tar: named in index.json, but not there"):
        ShardStore(folder)


class Poison:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return exec, (f"open({self.mark!r}, 'w').close()",)


def test_nothing_in_a_tar_is_unpickled(tmp_path):
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Poison(mark)))
    assert mark.exists()  # the poison works
    mark.unlink()
    with_objects = npy(np.array([[[[Poison(mark)]]]], dtype=object), allow_pickle=True)
    for data in (pickle.dumps(Poison(mark)), with_objects):
        folder = write_set(tmp_path / hashlib.sha256(data).hexdigest()[:8], TARS, replace={("a0", m): data for m in ("image.npy", "meta.json")})
        with pytest.raises(BadSample):
            ShardStore(folder).subject("a0")
        folder = write_set(tmp_path / (folder.name + "image"), TARS, replace={("a0", "image.npy"): data})
        with pytest.raises(BadSample):
            ShardStore(folder).subject("a0")
    assert not mark.exists()


def test_members_of_other_kinds_are_refused(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["subjects"][0]["members"]["image.pkl"] = (0, 10)
    for extra in ((), ("image.pkl",)):
        (folder / "index.json").write_text(json.dumps({**index, "extra_members": extra}))
        with pytest.raises(UserError, match="image.pkl"):
            ShardStore(folder)


GOOD = members_of("a0")


@pytest.mark.parametrize(
    "member, data",
    [
        ("image.npy", GOOD["image.npy"][:-2]),
        ("image.npy", npy(np.zeros((4, *SHAPE), np.float32))),
        ("image.npy", npy(np.zeros((3, *SHAPE), np.float16))),
        ("image.npy", npy(np.asfortranarray(np.zeros((4, *SHAPE), np.float16)))),
        ("label.npy", npy(np.zeros((2, 2, 2), np.uint8))),
        ("brain.npy", b"no npy at all"),
        ("meta.json", b"{"),
        ("meta.json", members_of("a1")["meta.json"]),
    ],
)
def test_a_bad_member_names_tar_and_subject_in_one_line(tmp_path, member, data):
    folder = write_set(tmp_path / "s", TARS, replace={("a0", member): data})
    with pytest.raises(BadSample, match=r"tiny-000000.tar: subject a0 cannot be decoded \(") as error:
        ShardStore(folder).subject("a0")
    assert "\n" not in str(error.value)
    ShardStore(folder).subject("a1")


def alter(tar, offset, data):
    with tar.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_a_tar_that_was_cut_or_replaced_after_the_set_was_opened_stops_the_run(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    store = ShardStore(folder)
    first, second = folder / "tiny-000000.tar", folder / "tiny-000001.tar"
    data = first.read_bytes()
    first.write_bytes(data[:-1024])
    with pytest.raises(UserError, match=r"tiny-000000\.tar: truncated: \d+ bytes") as error:
        store.subject("a0")
    assert not isinstance(error.value, BadSample)  # no other subject takes its place
    first.write_bytes(second.read_bytes() + b"\0" * (len(data) - second.stat().st_size))
    with pytest.raises(UserError, match=r"tiny-000000\.tar: altered .*it has 'b0\.image\.npy'.*where index\.json has a0\.image\.npy") as error:
        store.subject("a2")  # by the tar's first header, which is not a2's
    assert not isinstance(error.value, BadSample)


def test_a_members_header_is_compared_with_the_index(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    offset, _ = ShardStore(folder).subjects["a1"].members["brain.npy"]
    alter(folder / "tiny-000000.tar", offset - 512, tarfile.TarInfo("a1.other.npy").tobuf(tarfile.USTAR_FORMAT))
    store = ShardStore(folder)
    store.subject("a0")
    with pytest.raises(UserError, match=r"altered .*'a1\.other\.npy', 0 bytes, where index\.json has a1\.brain\.npy"):
        store.subject("a1")
    alter(folder / "tiny-000000.tar", offset - 512, b"\xff" * 512)
    with pytest.raises(UserError, match="altered since the index was made: at byte .*not a tar header"):
        ShardStore(folder).subject("a1")


def test_the_hash_is_checked_on_request_once_per_process(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    offset, size = ShardStore(folder).subjects["a1"].members["image.npy"]
    sound = ShardStore(folder, verify_sha256=True)
    sound.subject("a0")
    alter(folder / "tiny-000000.tar", offset + size - 1, b"\x11")
    assert ShardStore(folder).subject("a0").meta.subject == "a0"
    with pytest.raises(UserError, match=r"tiny-000000\.tar: altered .*its sha256 differs from index\.json") as error:
        ShardStore(folder, verify_sha256=True).subject("a0")
    assert not isinstance(error.value, BadSample)
    again = pickle.loads(pickle.dumps(sound))  # mapped anew, but its hash is known to have been right
    assert again.subject("a0").meta.subject == "a0"


def test_an_unlisted_tar_stops_the_run(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    (folder / "tiny-000009.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"tiny-000009\.tar: not in index\.json"):
        ShardStore(folder)


def test_meta_data_of_another_patient_or_shape_are_not_believed(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    values = json.loads((folder / "index.json").read_text())
    entries = values["shards"][0]["subjects"]
    entries[0]["patient"], entries[1]["shape"] = "other", [SHAPE[0], SHAPE[2], SHAPE[1]]
    (folder / "index.json").write_text(json.dumps(values))
    store = ShardStore(folder)
    for key, words in (("a0", "disagree"), ("a1", "shapes do not fit")):
        with pytest.raises(BadSample, match=f"{key} cannot be decoded .*{words}"):
            store.subject(key)
    assert store.subject("a2").meta.subject == "a2"


def test_a_set_on_a_server_is_read_through_the_cache(tmp_path):
    folder = write_set(tmp_path / "s", TARS)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/s"
        try:
            with pytest.raises(UserError, match="data.cache_dir: not set, and http://127.*/s lies on a server"):
                ShardStore(address)
            store = pickle.loads(pickle.dumps(ShardStore(address, tmp_path / "cache")))
            np.testing.assert_array_equal(store.subject("b0").image, ShardStore(folder).subject("b0").image)
            assert store.place == address and [path.name[17:] for path in (tmp_path / "cache").glob("*.tar")] == ["tiny-000001.tar"]
            with pytest.raises(UserError, match=r"shard set http://.*/cache: index\.json or splits\.json is missing"):
                ShardStore(address.removesuffix("s") + "cache", tmp_path / "cache")
            (folder / "index.json").write_text('{"version": 2}')
            with pytest.raises(UserError, match=r"http://.*/s/index\.json: version"):
                ShardStore(address, tmp_path / "cache")
        finally:
            server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
