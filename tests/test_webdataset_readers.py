"""Any WebDataset reader opens our tars, and our store reads tars that a plain WebDataset writer made."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from nifti_trees import write_phantom_like
from torch.utils.data import DataLoader

from mstkd.data.store import ShardStore
from mstkd.shards.build import build
from mstkd.shards.foreign import index_foreign
from mstkd.shards.members import decode_array, decode_meta
from mstkd.shards.verify import verify

SUFFIXES = ("image.npy", "brain.npy", "label.npy", "meta.json")
DTYPES = {"image.npy": np.float16, "brain.npy": np.uint8, "label.npy": np.uint8}
SUBJECTS = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A set of four tars, two subjects in each but the last."""
    folder = tmp_path_factory.mktemp("readers")
    build("phantom", write_phantom_like(folder / "src", SUBJECTS), folder / "set", subjects_per_shard=2)
    return ShardStore(folder / "set")


def tars(store):
    return [str(store.folder / shard.file) for shard in store.index.shards]


def assert_same(sample, store):
    """A decoded WebDataset sample holds what the store gives for its key."""
    stored = store.subject(sample["__key__"])
    assert {key for key in sample if not key.startswith("__")} == set(SUFFIXES)
    for suffix, expected in (("image.npy", stored.image), ("brain.npy", stored.brain), ("label.npy", stored.label)):
        found = np.asarray(sample[suffix])
        assert found.dtype == DTYPES[suffix] and np.array_equal(found, expected)
    assert sample["meta.json"]["subject"] == sample["__key__"] and tuple(sample["meta.json"]["sequences"]) == stored.meta.sequences


def test_plain_webdataset_decodes_every_subject(store):
    samples = list(webdataset.WebDataset(tars(store), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == list(store.subjects)
    for sample in samples:
        assert_same(sample, store)


def test_webdataset_decodes_with_our_allow_list(store):
    def array(suffix, payload):
        return decode_array(payload) if suffix.endswith("npy") else None

    def meta(suffix, payload):
        return decode_meta(payload).model_dump(mode="json") if suffix.endswith("json") else None

    samples = webdataset.WebDataset(tars(store), shardshuffle=False).decode(array, meta, only=list(SUFFIXES))
    assert sum(1 for sample in samples if assert_same(sample, store) is None) == SUBJECTS


def test_webdataset_hands_out_tuples_by_suffix(store):
    tuples = webdataset.WebDataset(tars(store), shardshuffle=False).decode().to_tuple("__key__", "image.npy", "label.npy")
    for key, image, label in tuples:
        assert np.array_equal(image, store.subject(key).image) and label.shape == image.shape[1:]


def test_a_torch_loader_reads_the_tars_with_workers(store):
    samples = webdataset.WebDataset(tars(store), shardshuffle=False).decode()
    found = {sample["__key__"]: sample for sample in DataLoader(samples, batch_size=None, num_workers=2)}
    assert set(found) == set(store.subjects)
    for sample in found.values():
        assert torch.is_tensor(sample["image.npy"]) and sample["image.npy"].dtype == torch.float16
        assert_same(sample, store)


def test_tarfile_and_numpy_read_the_tars(store):
    for path, shard in zip(tars(store), store.index.shards, strict=True):
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            assert [member.name for member in members] == [f"{entry.subject}.{suffix}" for entry in shard.subjects for suffix in SUFFIXES]
            for member in members:
                assert member.isreg() and (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "mstkd")
                key, _, suffix = member.name.partition(".")
                payload = tar.extractfile(member).read()
                if suffix != "meta.json":
                    assert np.array_equal(np.load(io.BytesIO(payload), allow_pickle=False), getattr(store.subject(key), suffix.split(".")[0]))
                else:
                    assert json.loads(payload)["subject"] == key


def test_the_system_tar_lists_and_extracts_them(store, tmp_path):
    path = tars(store)[0]
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"{entry.subject}.{suffix}" for entry in store.index.shards[0].subjects for suffix in SUFFIXES]
    subprocess.run(["tar", "-xf", path, "-C", str(tmp_path)], check=True)
    assert np.array_equal(np.load(tmp_path / listed[0]), store.subject(listed[0].partition(".")[0]).image)


RANK = """
import json, sys, webdataset
data = webdataset.WebDataset(sys.argv[1:], shardshuffle=False, nodesplitter=webdataset.split_by_node).decode()
print(json.dumps([[sample["__key__"], float(sample["image.npy"].astype("f8").sum())] for sample in data]))
"""


def test_two_ranks_split_the_tars_between_them(store):
    found = []
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", RANK, *tars(store)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(dict(json.loads(done.stdout)))
    assert found[0] and found[1] and not set(found[0]) & set(found[1])
    sums = {key: float(store.subject(key).image.astype("f8").sum()) for key in store.subjects}
    assert found[0] | found[1] == sums


# the other way round


@pytest.fixture(scope="module", params=[{}, {"mtime": 0}], ids=["with times", "without"])
def foreign(request, store, tmp_path_factory):
    """The same subjects written by a plain WebDataset `ShardWriter`, with its own encoders, then indexed.

    By default it stamps members with fractions of a second, which takes a pax header before each.
    """
    folder = tmp_path_factory.mktemp("foreign") / "set"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "theirs-%06d.tar"), maxcount=3, verbose=0, **request.param) as writer:
        for key in store.subjects:
            sample = store.subject(key)
            arrays = {"image.npy": sample.image, "brain.npy": sample.brain, "label.npy": sample.label}
            writer.write({"__key__": key, **arrays, "meta.json": sample.meta.model_dump(mode="json")})
    index_foreign(folder, "phantom")
    return folder


def test_our_store_reads_tars_that_a_plain_writer_made(store, foreign):
    theirs = ShardStore(foreign)
    assert [len(shard.subjects) for shard in theirs.index.shards] == [3, 3, 1]
    assert set(theirs.subjects) == set(store.subjects)
    for key, entry in theirs.subjects.items():
        ours, read = store.subject(key), theirs.subject(key)
        assert read.meta == ours.meta and read.image.dtype == np.float16
        for name in ("image", "brain", "label"):
            assert np.array_equal(getattr(read, name), getattr(ours, name))
        assert entry.fingerprint == store.subjects[key].fingerprint and entry.shape == store.subjects[key].shape


def test_an_indexed_foreign_set_verifies(foreign):
    verify(foreign)


def test_stored_arrays_cannot_be_written_to(store):
    image = store.subject(next(iter(store.subjects))).image
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0, 0] = 1
