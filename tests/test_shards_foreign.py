"""`mstkd shards index`: tars that another program wrote become a set, or are refused with what is expected of them."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds
from nifti_trees import write_phantom_like

from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.shards.build import build
from mstkd.shards.foreign import index_foreign
from mstkd.shards.spec import read_index, read_splits
from mstkd.shards.verify import verify

SUFFIXES = ("image.npy", "brain.npy", "label.npy", "meta.json")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    build("phantom", write_phantom_like(folder / "src", 5), folder / "set", subjects_per_shard=2)
    return folder / "set"


@pytest.fixture(scope="module")
def samples(ours):
    """(key, {suffix: bytes}) of every subject."""
    read = wds.WebDataset([str(path) for path in sorted(ours.glob("*.tar"))], shardshuffle=False)
    return [(sample["__key__"], {suffix: sample[suffix] for suffix in SUFFIXES}) for sample in read]


def write_tars(folder, members, per_tar=8, format=tarfile.USTAR_FORMAT):
    """Plain tars of (name, payload) pairs."""
    folder.mkdir(exist_ok=True)
    for start in range(0, len(members), per_tar):
        with tarfile.open(folder / f"x-{start // per_tar:03d}.tar", "w", format=format) as tar:
            for name, payload in members[start : start + per_tar]:
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return folder


def members_of(samples, suffixes=SUFFIXES):
    return [(f"{key}.{suffix}", payload[suffix]) for key, payload in samples for suffix in suffixes]


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_our_own_tars_get_the_index_they_had(ours, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for tar in ours.glob("*.tar"):
        shutil.copy(tar, folder)
    index_foreign(folder, "phantom", workers=2)
    for name in ("index.json", "splits.json"):
        assert (folder / name).read_bytes() == (ours / name).read_bytes()
    assert json.loads((folder / "fingerprint.json").read_text())["subjects"] == 5


@pytest.mark.parametrize("options", [{}, {"mtime": 0}], ids=["as it comes", "fixed time"])
def test_tars_of_a_plain_shard_writer(samples, ours, tmp_path, options):
    """Which sorts members by name, and as it comes keeps the time in extended headers."""
    with wds.ShardWriter(str(tmp_path / "x-%04d.tar"), maxcount=2, verbose=0, **options) as writer:
        for key, payload in samples:
            writer.write({"__key__": key, **payload})
    index_foreign(tmp_path, "phantom")
    assert verify(tmp_path).sequences == ("flair", "t1", "t1ce", "t2")
    theirs, own = ShardStore(tmp_path), ShardStore(ours)
    for key, _ in samples:
        np.testing.assert_array_equal(theirs.subject(key).image, own.subject(key).image)
        np.testing.assert_array_equal(theirs.subject(key).label, own.subject(key).label)
    assert read_splits(tmp_path) == read_splits(ours)


def test_sequences_come_from_the_meta_data_without_a_spec(samples, tmp_path):
    write_tars(tmp_path / "set", members_of(samples, ("meta.json", "image.npy", "brain.npy")), per_tar=6)
    index_foreign(tmp_path / "set")
    index = verify(tmp_path / "set")
    assert index.sequences == ("flair", "t1", "t1ce", "t2") and index.label_scheme is None and index.dataset == "set"
    with pytest.raises(UserError, match="exists already; check the set with mstkd shards verify, or remove it"):
        index_foreign(tmp_path / "set")


def test_splits_that_are_there_are_kept(samples, tmp_path):
    folder = write_tars(tmp_path / "set", members_of(samples))
    keys = [key for key, _ in samples]
    (folder / "splits.json").write_text(json.dumps({"folds": [{"train": keys[:3], "val": ["nobody"]}]}))
    with pytest.raises(UserError, match="names subject 'nobody'"):
        index_foreign(folder, "phantom")
    assert not (folder / "index.json").exists()
    (folder / "splits.json").write_text(json.dumps({"folds": [{"train": keys[:3], "val": keys[3:]}]}))
    index_foreign(folder, "phantom")
    assert read_splits(folder).folds[0].val == tuple(keys[3:]) and len(read_index(folder).subjects()) == 5
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"splits\.json: exists already; remove it, or leave out --splits"):
        index_foreign(folder, "phantom", splits=tmp_path / "mine.json")


def test_the_range_of_z_scores_is_that_of_the_voxels_whatever_the_meta_data_claim(samples, tmp_path):
    def far(payload):
        told = json.loads(payload)
        for stats in told["stats"].values():
            stats["max"] = stats["mean"] + 1000 * stats["std"]
        return json.dumps(told).encode()

    fingerprints = []
    for name, change in (("told", lambda payload: payload), ("claimed", far)):
        members = [(member, change(payload) if member.endswith("meta.json") else payload) for member, payload in members_of(samples)]
        index_foreign(write_tars(tmp_path / name, members), "phantom")
        found = json.loads((tmp_path / name / "fingerprint.json").read_text())["sequences"]
        fingerprints.append({sequence: facts["z_score"] for sequence, facts in found.items()})
    assert len(fingerprints[0]) == 4 and fingerprints[0] == fingerprints[1]


def test_two_patients_need_explicit_splits(samples, tmp_path):
    folder, mine = write_tars(tmp_path / "set", members_of(samples[:2])), tmp_path / "mine.json"
    with pytest.raises(UserError, match=r"2 patient\(s\): too few .* --splits FILE"):
        index_foreign(folder, "phantom")
    mine.write_text(json.dumps({"folds": [{"train": [samples[0][0]], "val": [samples[1][0]]}]}))
    index_foreign(folder, "phantom", splits=mine)
    assert verify(folder).dataset == "phantom" and read_splits(folder).folds[0].train == (samples[0][0],)


def replaced(suffix, change):
    """Another payload for the second subject's `suffix`."""

    def edit(members):
        place = next(i for i, (name, _) in enumerate(members) if name == f"Phantom_0001.{suffix}")
        members[place] = (members[place][0], change(members[place][1]))

    return edit


def array(change):
    return lambda payload: npy(change(np.load(io.BytesIO(payload))))


def meta(**fields):
    return lambda payload: json.dumps({**json.loads(payload), **fields}).encode()


def without(field):
    return lambda payload: json.dumps({key: value for key, value in json.loads(payload).items() if key != field}).encode()


def renamed(old, new):
    def edit(members):
        members[:] = [(name.replace(old, new), payload) for name, payload in members]

    return edit


def set_voxel(value, place):
    def change(volume):
        volume[place] = value
        return volume

    return change


REFUSED = {
    "apart": (lambda m: m.append(m.pop(4)), r"subject Phantom_0001: its members are not adjacent"),
    "dots in keys": (renamed("Phantom_0001", "Phantom.0001"), r"member 'Phantom\.0001\.image\.npy': what follows the first dot must be one of"),
    "other member": (lambda m: m.insert(1, ("Phantom_0000.mask.npy", b"x")), r"'Phantom_0000\.mask\.npy': what follows the first dot must be"),
    "pickle": (lambda m: m.insert(1, ("Phantom_0000.image.pyd", b"x")), r"member 'Phantom_0000\.image\.pyd' does not belong"),
    "traversal": (renamed("Phantom_0001", "../Phantom"), r"member '\.\./Phantom\.image\.npy' does not belong"),
    "twice": (lambda m: m.insert(1, m[0]), r"'Phantom_0000\.image\.npy' is there twice"),
    "no meta": (lambda m: m.pop(7), r"subject Phantom_0001: no meta\.json; it needs subject, patient, sequences, stats, spacing_mm"),
    "no brain": (lambda m: m.pop(5), r"subject Phantom_0001: no brain\.npy"),
    "float32": (replaced("image.npy", array(np.float32)), r"Phantom_0001: image\.npy is float32 \(.*\); expected float16 \(4, "),
    "label int16": (replaced("label.npy", array(np.int16)), r"Phantom_0001: label\.npy is int16 .*; expected uint8"),
    "other shape": (replaced("brain.npy", array(lambda a: a[1:])), r"brain\.npy is uint8 .*, the box that meta\.json gives"),
    "too few channels": (replaced("image.npy", array(lambda a: a[:3])), r"image\.npy is float16 \(3, .* expected float16 \(4, "),
    "not finite": (replaced("image.npy", array(set_voxel(np.nan, (0, 5, 5, 5)))), r"image\.npy holds NaN"),
    "background": (replaced("brain.npy", array(set_voxel(0, (7, 7, 6)))), r"image\.npy must be exactly 0 where brain\.npy is 0"),
    "brain values": (replaced("brain.npy", array(set_voxel(3, (7, 7, 6)))), r"brain\.npy must hold 0 and 1"),
    "label values": (replaced("label.npy", array(set_voxel(3, (7, 7, 6)))), r"label\.npy holds 3, which scheme brats2018 \(0, 1, 2, 4\)"),
    "not npy": (replaced("image.npy", lambda _: b"\x80\x04pickle"), r"image\.npy cannot be decoded"),
    "objects": (replaced("image.npy", lambda _: npy(np.array([{}], object))), r"image\.npy cannot be decoded"),
    "other subject": (replaced("meta.json", meta(subject="Phantom_0000")), r"Phantom_0001: meta\.json: is about subject Phantom_0000"),
    "meta lacks": (replaced("meta.json", without("spacing_mm")), r"meta\.json: spacing_mm: Field required; it needs subject"),
    "meta order": (replaced("meta.json", meta(sequences=["t1", "flair"])), r"lists sequences t1, flair; expected some of flair, t1, t1ce, t2"),
    "meta absent": (replaced("meta.json", meta(sequences=["flair"], stats={})), r"stats must have exactly the sequences flair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(samples, tmp_path, case):
    edit, words = REFUSED[case]
    members = members_of(samples)
    edit(members)
    folder = write_tars(tmp_path / "set", members, per_tar=100)
    with pytest.raises(UserError, match=words) as error:
        index_foreign(folder, "phantom")
    assert "x-000.tar" in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["x-000.tar"]


def test_labels_need_a_spec_and_keys_are_one_of_a_kind(samples, tmp_path):
    with pytest.raises(UserError, match=r"label\.npy is there, but no label scheme is known; name it with --spec"):
        index_foreign(write_tars(tmp_path / "labelled", members_of(samples)))
    with pytest.raises(UserError, match=r"x-001\.tar: subject Phantom_0000 is in x-000\.tar too"):
        index_foreign(write_tars(tmp_path / "twice", members_of(samples[:2] + samples[:1])), "phantom")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \*\.tar in it"):
        index_foreign(tmp_path / "empty")


def test_sequences_that_do_not_nest_are_refused(samples, tmp_path):
    changed = [(key, dict(payload)) for key, payload in samples]
    changed[1][1]["meta.json"] = meta(sequences=["t2", "flair"])(changed[1][1]["meta.json"])
    with pytest.raises(UserError, match="Phantom_0001: sequences t2, flair are no part of flair, t1, t1ce, t2, in that order; give --spec"):
        index_foreign(write_tars(tmp_path / "set", members_of(changed, ("image.npy", "brain.npy", "meta.json")), per_tar=6))


def test_a_cut_or_packed_tar_is_refused(samples, tmp_path):
    folder = write_tars(tmp_path / "set", members_of(samples), per_tar=100)
    whole = (folder / "x-000.tar").read_bytes()
    (folder / "x-000.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x-000\.tar: .*claims \d+ bytes.*a set is made of plain, uncompressed tars"):
        index_foreign(folder, "phantom")
    with tarfile.open(folder / "x-000.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"x-000\.tar: not a tar header"):
        index_foreign(folder, "phantom")
