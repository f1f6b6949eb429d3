"""Crafted shard sets are refused in one line: nothing runs, nothing is written, next to no memory is taken."""

import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hostile_shards import ATTACKS, Poison, write_attacks
from hypothesis import given, settings
from hypothesis import strategies as st

from mstkd.data.location import check_location
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.shards.layout import parse_index
from mstkd.shards.members import decode_array, decode_json, encode_array
from mstkd.shards.tar_walk import Member, read_header, split_name, walk

GROWTH_LIMIT_MIB = 48


def listing(root):
    return {str(path.relative_to(root)): path.lstat().st_size for path in root.rglob("*") if "tars/sound" not in str(path)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """reader -> attack -> (exception, message, MiB), all from one process whose memory is limited."""
    root = tmp_path_factory.mktemp("hostile")
    write_attacks(root / "data")
    before = listing(root.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("hostile_reader.py")), str(root / "data")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert listing(root.parent) == before, "a reader left files"
    return json.loads(done.stdout)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("reader", ["verify", "store", "index"])
def test_an_attack_is_refused(outcomes, reader, attack):
    words = dict(zip(("verify", "store", "index"), ATTACKS[attack][1:]))[reader]
    if words is None and reader == "index":
        assert attack not in outcomes[reader]  # it is in the index alone
        return
    kind, message, growth_mib = outcomes[reader][attack]
    assert growth_mib < GROWTH_LIMIT_MIB
    if words is None:  # training reads the sound members around it, at the places that the index gives
        assert kind == "read", message
        return
    assert kind in ("UserError", "BadSample") and re.search(words, message), f"{kind}: {message}"
    assert "\n" not in message and len(message) < 600


def test_the_limits_bite_and_the_poison_works(outcomes, tmp_path):
    """Else the tests above prove nothing."""
    assert outcomes["limits"]["memory"][0] == "MemoryError" and outcomes["limits"]["disk"][0] == "OSError"
    pickle.loads(pickle.dumps(Poison(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "path",
    ["pipe:touch executed", " pipe:touch executed", "PIPE:x", "pipe:", "|touch executed", "file:///etc", "simplecache::http://h/a", "ftp://h/a", "http:a",
     "http:///a", "http://h/a::file:///etc", "s3://", "https://h/../a", "memory://a", "data:text/plain,x", "a\0b", "a\nb", "", " ", "gs://b/a", "https://u:p@/x", "https://u:p/w@h/a", "https://h/a#token"],
)  # fmt: skip
def test_addresses_that_are_not_read_from(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data.shards: ") as error:
        ShardStore(path)
    assert "\n" not in str(error.value) and "u:p" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path, scheme", [("shards", ""), ("/data/a:b", ""), ("./pipe:x", ""), ("~/x y", ""), ("http://h:80/a?k=1", "http"),
                                          ("https://u:p@h/a", "https"), ("s3://bucket/a", "s3"), ("http://[::1]:8080/a", "http")])  # fmt: skip
def test_addresses_that_are(path, scheme):
    assert check_location(path) == scheme


def test_times_in_extended_headers_are_passed_over(tmp_path):
    """ShardWriter's own default: without them, its tars would not be plain enough."""
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), verbose=0) as writer:
        writer.write({"__key__": "a0", "meta.json": b"{}"})
    with tarfile.open(tmp_path / "x-000000.tar") as tar:
        written = [Member(info.name, info.offset_data, info.size) for info in tar if info.pax_headers]
    assert list(walk(tmp_path / "x-000000.tar")) == written and len(written) == 1


@settings(max_examples=300)
@given(st.binary(max_size=600), st.booleans())
def test_bytes_are_an_array_or_a_value_error(data, with_magic):
    payload = b"\x93NUMPY\x01\x00" + data if with_magic else data
    for decode in (decode_array, decode_json, read_header, lambda block: parse_index(block, "index.json")):
        try:
            decode(payload)
        except (ValueError, UserError):
            pass


@settings(max_examples=100)
@given(st.text(max_size=120))
def test_a_members_name_is_plain_or_refused(name):
    try:
        subject, suffix = split_name(name)
    except ValueError:
        return
    assert f"{subject}.{suffix}" == name and not set(name) & set("/\\\0 ") and ".." not in name and suffix.endswith((".npy", ".json"))


@settings(max_examples=50)
@given(shape=st.lists(st.integers(1, 4), max_size=4).map(tuple), dtype=st.sampled_from(["f2", "u1", "i4", "f8", "?"]), cut=st.integers(0, 3))
def test_an_array_comes_back_or_its_bytes_do_not_fit(shape, dtype, cut):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    payload = encode_array(array)
    if cut == 0:
        decoded = decode_array(payload)
        np.testing.assert_array_equal(decoded, array)
        assert decoded.dtype == array.dtype and not decoded.flags.writeable
        return
    for wrong in (payload[:-cut], payload + b"\0" * cut):
        with pytest.raises(ValueError):
            decode_array(wrong)
