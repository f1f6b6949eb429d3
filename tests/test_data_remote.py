"""Shard sets on servers: interrupted and failing downloads, what is never used, what is never said."""

import hashlib
import io
import multiprocessing
import pickle
import subprocess
import sys
import threading

import pytest
from faulty_server import serving
from test_data_loader import data_config, micro_batches, same
from tiny_shards import TARS, write_set

from mstkd.data.remote import TRIES, LocalFolder, Receiver, RemoteFolder, is_remote, open_folder, shown
from mstkd.data.staging import StagingCache
from mstkd.data.training import open_training
from mstkd.errors import UserError
from mstkd.shards.spec import read_index

TAR = "tiny-000000.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", [["a"], ["b"]])


@pytest.fixture
def entry(folder):
    return read_index(folder).shards[0]


def staged(folder, entry, cache, gib=1.0):
    """The sha256 of the staged copy."""
    with StagingCache(cache, gib).open(folder, entry) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remote(server):
    return RemoteFolder(server.url, pause_s=0.001)


def left_in(cache):
    return sorted(path.suffix for path in cache.iterdir() if path.name != "lock")


def test_a_tar_comes_once_and_is_the_original(folder, entry, tmp_path):
    with serving(folder) as server:
        for _ in range(3):
            assert staged(remote(server), entry, tmp_path) == entry.sha256
        assert server.requests == {TAR: 1}
        assert remote(server).read_bytes("index.json") == (folder / "index.json").read_bytes()


@pytest.mark.parametrize("faults", [[500, 503], [("drop", 1000), ("drop", 0), ("drop", 7)], [429, ("drop", 20_000), 500]])
@pytest.mark.parametrize("ranges", [True, False])
def test_failures_that_pass_are_survived(folder, entry, tmp_path, faults, ranges):
    with serving(folder, ranges=ranges) as server:
        server.faults[TAR] = list(faults)
        assert staged(remote(server), entry, tmp_path) == entry.sha256
        assert server.requests[TAR] == len(faults) + 1
        assert left_in(tmp_path) == [".tar"]


def test_what_had_come_is_not_fetched_again(tmp_path):
    (tmp_path / "big.tar").write_bytes(bytes(8 * 2**20))
    with serving(tmp_path) as server:
        server.faults["big.tar"] = [("drop", 6 * 2**20)]
        receiver = Receiver(io.BytesIO(), 8 * 2**20)
        remote(server).download("big.tar", receiver)
        assert receiver.sha256 == hashlib.sha256(bytes(8 * 2**20)).hexdigest()
        assert server.requests["big.tar"] == 2 and server.sent_bytes["big.tar"] < 9 * 2**20  # a buffer's worth may be lost


def test_more_interruptions_than_tries_are_survived_while_bytes_come(tmp_path):
    (tmp_path / "big.tar").write_bytes(bytes(8 * 2**20))
    with serving(tmp_path) as server:
        server.faults["big.tar"] = [("drop", 2**20), 503] * (TRIES + 1)
        remote(server).download("big.tar", receiver := Receiver(io.BytesIO(), 8 * 2**20))
        assert receiver.received_bytes == 8 * 2**20 and server.requests["big.tar"] == 2 * (TRIES + 1) + 1


@pytest.mark.parametrize(
    "faults, message, requests",
    [
        ([500] * 20, rf"the server answers HTTP 500 .*; tried {TRIES} times", TRIES),
        ([404], r"named in index.json, but not there \(404\)", 1),
        ([403], r"access denied \(HTTP 403\); credentials belong in ~/.netrc", 1),
        ([410], r"the server answers HTTP 410", 1),
        ([("drop", 0)] * 20, rf"ClientPayloadError.*; tried {TRIES} times", TRIES),
        (["wrong"], r"its sha256 differs from index.json", 1),
    ],
)
def test_failures_that_stay_name_the_url_and_leave_nothing(folder, entry, tmp_path, faults, message, requests):
    with serving(folder) as server:
        server.faults[TAR] = list(faults)
        with pytest.raises(UserError, match=f"{server.url}/{TAR}: {message}") as error:
            staged(remote(server), entry, tmp_path)
        assert "\n" not in str(error.value) and server.requests[TAR] == requests
    assert left_in(tmp_path) == []


def test_a_server_without_ranges_that_always_drops_is_given_up(folder, entry, tmp_path):
    with serving(folder, ranges=False) as server:
        server.faults[TAR] = [("drop", 5000)] * 50
        with pytest.raises(UserError, match=f"tried {TRIES} times"):
            staged(remote(server), entry, tmp_path)
        assert server.requests[TAR] <= TRIES + 1


def test_nobody_there_is_said_in_one_line(tmp_path, entry):
    with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:9/set/{TAR}: ClientConnectorError: .*; tried {TRIES} times") as error:
        staged(RemoteFolder("http://127.0.0.1:9/set", pause_s=0.001), entry, tmp_path)
    assert "\n" not in str(error.value)


def test_a_longer_file_than_the_index_says_is_refused(folder, entry, tmp_path):
    short = entry.model_copy(update={"bytes": entry.bytes - 512})
    with serving(folder) as server, pytest.raises(UserError, match=f"{TAR}: more than the {short.bytes} bytes"):
        staged(remote(server), short, tmp_path)
    with serving(folder) as server, pytest.raises(UserError, match="index.json: more than the 10 bytes"):
        remote(server).read_bytes("index.json", limit_bytes=10)
    with serving(folder) as server, pytest.raises(FileNotFoundError):
        remote(server).read_bytes("splits.yaml")


def _stage(url, entry, cache, results):
    results.put(staged(RemoteFolder(url, pause_s=0.001), entry, cache))


def test_two_processes_download_once(folder, entry, tmp_path):
    context = multiprocessing.get_context("fork")
    with serving(folder) as server:
        staged(remote(server), read_index(folder).shards[1], tmp_path)  # a connection of the parent is no good to its children
        results = context.Queue()
        server.faults[TAR] = [("drop", 3000)]
        processes = [context.Process(target=_stage, args=(server.url, entry, tmp_path, results)) for _ in range(4)]
        for process in processes:
            process.start()
        assert [results.get(timeout=60) for _ in processes] == [entry.sha256] * 4
        for process in processes:
            process.join()
        assert server.requests[TAR] == 2 and server.sent_bytes[TAR] == entry.bytes


def test_a_download_that_was_killed_is_not_used_and_begun_anew(folder, entry, tmp_path):
    context = multiprocessing.get_context("fork")
    with serving(folder) as server:
        server.gate = threading.Event()
        process = context.Process(target=_stage, args=(server.url, entry, tmp_path, context.Queue()))
        process.start()
        while not server.requests[TAR]:
            assert process.is_alive()
            process.join(0.01)
        process.kill()
        process.join()
        assert left_in(tmp_path) == [".part"]
        server.gate.set()
        assert staged(remote(server), entry, tmp_path) == entry.sha256
    assert left_in(tmp_path) == [".tar"]


def test_a_remote_folder_travels_to_a_worker_after_use(folder):
    with serving(folder) as server:
        used = remote(server)
        used.read_bytes("splits.json")
        assert pickle.loads(pickle.dumps(used)).read_bytes("splits.json") == (folder / "splits.json").read_bytes()


SECRET = "http://someuser:topsecret@127.0.0.1:{port}/set?token=topsecret&x=1"


def test_credentials_are_used_and_never_said(folder, entry, tmp_path, caplog):
    caplog.set_level("DEBUG", "mstkd")
    with serving(folder) as server:
        location = SECRET.format(port=server.port)
        server.faults[TAR] = [500]
        secret = RemoteFolder(location, pause_s=0.001)
        staged(secret, entry, tmp_path)
        assert server.headers[-1]["path"] == f"/set/{TAR}?token=topsecret&x=1" and server.headers[-1]["Authorization"].startswith("Basic ")
        said = [caplog.text, str(secret), secret / TAR, shown(location), shown(f"cannot read {location}: no")]
        assert "trying again" in caplog.text
        for faults in ([404], [403], [500] * 9, ["wrong"], [("drop", 0)] * 9):
            server.faults[TAR] = faults
            with pytest.raises(UserError) as error:
                staged(secret, entry, tmp_path / "other")
            said.append(str(error.value))
            assert error.value.__suppress_context__ or error.value.__context__ is None  # a traceback would show it
    said.append(str(pytest.raises(UserError, staged, RemoteFolder(location, pause_s=0.001), entry, tmp_path / "gone").value))
    for text in said:
        assert "topsecret" not in text and "someuser" not in text


@pytest.mark.parametrize(
    "given, kept",
    [
        ("https://u:p@s.org/a?sig=1#f", "https://s.org/a"),
        ("see http://u:p@s.org/a?x=y, or 'https://s.org/b?z'", "see http://s.org/a or 'https://s.org/b'"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("/data/a@b?c", "/data/a@b?c"),
        ("https://u:p@ss@s.org/a@b", "https://s.org/a@b"),
    ],
)
def test_what_is_shown_of_a_location(given, kept):
    assert shown(given) == kept


def test_locations(tmp_path):
    assert is_remote("https://s.org/a") and is_remote("S3://b/c") and not is_remote("/data/x") and not is_remote("pipe:curl x")
    assert isinstance(open_folder(str(tmp_path)), LocalFolder) and isinstance(open_folder("s3://bucket/set"), RemoteFolder)
    for location, message in (
        ("http:///set", "names no server"),
        ("s3:///set", "names no bucket"),
        ("s3://key:topsecret@bucket/set", "AWS_"),
        ("s3://bucket/set?token=topsecret", "AWS_"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_folder(location)
        assert "topsecret" not in str(error.value)


def test_a_local_file_that_goes_is_an_error_naming_it(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/x\.tar: cannot be read \(No such file"):
        LocalFolder(tmp_path).download("x.tar", Receiver(io.BytesIO(), 10))
    (tmp_path / "splits.json").write_bytes(b"12345")
    assert LocalFolder(tmp_path).read_bytes("splits.json") == b"12345"
    with pytest.raises(UserError, match="splits.json: more than the 4 bytes"):
        LocalFolder(tmp_path).read_bytes("splits.json", limit_bytes=4)


@pytest.fixture
def bucket(folder, monkeypatch, tmp_path):
    """s3://bucket/set on a server of this machine, through the AWS_* variables alone."""
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True)
    try:
        port = next(line for line in server.stderr if "Running on" in line).rpartition(":")[2].split()[0].strip("/")
        endpoint = f"http://127.0.0.1:{port}"
        for name, value in {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "topsecret", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        import s3fs

        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir("bucket")
        for path in folder.iterdir():
            system.put_file(str(path), f"s3://bucket/set/{path.name}")
        yield "s3://bucket/set"
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def test_a_set_in_a_bucket(bucket, folder, entry, tmp_path, monkeypatch):
    monkeypatch.setattr("mstkd.data.remote.PIECE_BYTES", 10_000)  # several requests
    store = RemoteFolder(bucket, pause_s=0.001)
    assert store.read_bytes("index.json") == (folder / "index.json").read_bytes()
    assert staged(store, entry, tmp_path) == entry.sha256
    with pytest.raises(FileNotFoundError):
        store.read_bytes("nothing.json")
    gone = entry.model_copy(update={"file": "gone.tar", "sha256": "0" * 64})
    with pytest.raises(UserError, match=r"s3://bucket/set/gone\.tar: named in index.json, but not there"):
        staged(store, gone, tmp_path)


def test_training_from_a_server_sees_the_same_batches_and_fetches_each_tar_once(tmp_path):
    folder = write_set(tmp_path / "set", TARS)
    with serving(folder) as server:
        server.faults = {"tiny-000000.tar": [("drop", 5000)], "index.json": [503]}
        config = data_config((server.url, 1), cache_dir=str(tmp_path / "cache"), workers=2)
        found = micro_batches(config, world=2, rank=0) | micro_batches(config, world=2, rank=1)
        assert same(found, micro_batches(data_config(folder)))
        assert server.requests == {"index.json": 3, "splits.json": 2, **{f"tiny-{n:06d}.tar": 1 + (n == 0) for n in range(len(TARS))}}


def test_a_remote_set_without_cache_or_without_its_files_is_an_error_in_one_line(tmp_path):
    with serving(tmp_path) as server:
        secret = server.url.replace("//", "//someuser:topsecret@")
        for config, message in (
            (data_config((secret, 1)), "data.cache_dir: not set, and http://127.0.0.1:"),
            (data_config((secret, 1), cache_dir=str(tmp_path / "cache")), r"http://127.0.0.1:\d+/set.*index.json"),
        ):
            with pytest.raises(UserError, match=message) as error:
                open_training(config, 0, False)
            assert "\n" not in str(error.value) and "topsecret" not in str(error.value)


def test_a_tar_that_is_wrong_on_the_server_stops_training_from_a_worker(tmp_path):
    folder = write_set(tmp_path / "set", TARS)
    with serving(folder) as server:
        server.faults = {f"tiny-{n:06d}.tar": ["wrong"] * 9 for n in range(len(TARS))}
        config = data_config((server.url, 1), cache_dir=str(tmp_path / "cache"), workers=2)
        with pytest.raises(UserError, match=rf"{server.url}/tiny-00000\d\.tar: its sha256 differs from index.json"):
            micro_batches(config)
