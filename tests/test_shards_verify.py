"""Verification notices every kind of damage, and says in one line where it is."""

import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from nifti_trees import write_phantom_like
from tiny_shards import write_set

from mstkd.errors import UserError
from mstkd.files import sha256_of
from mstkd.shards.build import build
from mstkd.shards.spec import read_index
from mstkd.shards.verify import verify

TAR = "phantom-000000.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    build("phantom", write_phantom_like(folder / "src", 4), folder / "set", subjects_per_shard=2)
    return folder / "set"


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "set")


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_index(change):
    """Change the first tar's entry."""
    return lambda folder: edit_json(folder / "index.json", lambda index: change(index["shards"][0]))


def edit_subject(change):
    return edit_index(lambda shard: change(shard["subjects"][0]))


def flip_byte(folder, suffix):
    tar, entry = folder / TAR, read_index(folder).shards[0].subjects[1]
    offset, size = entry.members[suffix]
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 0x10
    tar.write_bytes(data)


def rewrite(folder, change):
    """Rewrite the first tar after `change(list of (name, payload))`; the index follows in bytes, sha256 and offsets."""
    tar = folder / TAR
    with tarfile.open(tar) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    change(members)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    with tarfile.open(tar) as archive:
        places = {member.name: [member.offset_data, member.size] for member in archive}

    def follow(shard):
        shard.update(bytes=tar.stat().st_size, sha256=sha256_of(tar))
        for entry in shard["subjects"]:
            entry["members"] = {suffix: places.get(f"{entry['subject']}.{suffix}", old) for suffix, old in entry["members"].items()}

    edit_index(follow)(folder)


def replace_payload(suffix, payload):
    """Other bytes for a member of Phantom_0001, in a set whose index gives no shape to compare their size with."""

    def swap(members):
        members[:] = [(name, payload if name == f"Phantom_0001.{suffix}" else old) for name, old in members]

    def damage(folder):
        edit_index(lambda shard: shard["subjects"][1].pop("shape"))(folder)
        rewrite(folder, swap)

    return damage


def with_array(suffix, edit):
    """Edit a subject's array in place."""

    def swap(members):
        place = next(i for i, (name, _) in enumerate(members) if name == f"Phantom_0001.{suffix}")
        array, stream = np.load(io.BytesIO(members[place][1])), io.BytesIO()
        edit(array)
        np.save(stream, array)
        members[place] = (members[place][0], stream.getvalue())

    return lambda folder: rewrite(folder, swap)


def npy_zeros(dtype, order="C"):
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 3, 4), dtype, order=order))
    return stream.getvalue()


def scale(image):
    image *= 2
    image[0, :5] *= -1


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def swap_neighbours(members):
    members[1], members[4] = members[4], members[1]


DAMAGE = {
    "flipped byte": (lambda f: flip_byte(f, "image.npy"), rf"{TAR}: changed since it was built"),
    "flipped byte in a label": (lambda f: flip_byte(f, "label.npy"), rf"{TAR}: changed since it was built"),
    "cut tar": (lambda f: (f / TAR).write_bytes((f / TAR).read_bytes()[:-5000]), rf"{TAR}: truncated, \d+ of \d+ bytes"),
    "missing tar": (lambda f: (f / TAR).unlink(), rf"{TAR}: no such file"),
    "no tar at all": (lambda f: (f / TAR).write_bytes(b"x" * (f / TAR).stat().st_size), rf"{TAR}: not a readable tar"),
    "grown tar": (lambda f: (f / TAR).write_bytes((f / TAR).read_bytes() + b"\0" * 512), rf"{TAR}: changed since it was built"),
    "stray tar": (lambda f: shutil.copy(f / TAR, f / "more.tar"), r"more\.tar: not in index\.json"),
    "extra member": (lambda f: rewrite(f, lambda m: m.append(("Phantom_0001.evil.pkl", b"x"))), rf"{TAR}: subject Phantom_0001: member 'Phantom_0001\.evil\.pkl' does not belong"),
    "extra subject": (lambda f: rewrite(f, lambda m: m.append(("zz.meta.json", b"{}"))), r"subject zz: member 'zz\.meta\.json' is not in index"),
    "path outside": (lambda f: rewrite(f, lambda m: m.append(("../x.meta.json", b"{}"))), r"does not belong in a shard set"),
    "lost member": (lambda f: rewrite(f, lambda m: m.pop()), r"subject Phantom_0001: member 'Phantom_0001\.meta\.json' is there 0 times"),
    "member twice": (lambda f: rewrite(f, lambda m: m.append(m[-1])), "member 'Phantom_0001.meta.json' is there 2 times"),
    "not adjacent": (lambda f: rewrite(f, swap_neighbours), "subject Phantom_0001: its members are not adjacent and in order"),
    "pickle": (replace_payload("label.npy", pickle.dumps(Bomb())), r"subject Phantom_0001: label\.npy cannot be decoded"),
    "other image": (with_array("image.npy", scale), r"subject Phantom_0001: sequence flair: index\.json has the fingerprint of another image"),
    "image outside brain": (with_array("image.npy", lambda a: a.__setitem__((0, 0, 0, 0), 3)), r"subject Phantom_0001: image\.npy is not finite, or not 0 outside"),
    "label outside scheme": (with_array("label.npy", lambda a: a.__setitem__((0, 0, 0), 3)), r"subject Phantom_0001: label\.npy holds values outside"),
    "other label": (with_array("label.npy", lambda a: a.__setitem__((0, 0, 0), 2)), r"subject Phantom_0001: index\.json has other label volumes"),
    "index: sha256": (edit_index(lambda s: s.update(sha256="0" * 64)), rf"{TAR}: changed since it was built"),
    "index: offset": (edit_subject(lambda e: e["members"].update({"meta.json": [e["members"]["meta.json"][0], 5]})), r"subject Phantom_0000: meta\.json lies at"),
    "index: patient": (edit_subject(lambda e: e.update(patient="other")), r"subject Phantom_0000: meta\.json and index\.json disagree"),
    "index: shape": (edit_subject(lambda e: e.update(shape=[e["shape"][1], e["shape"][0], e["shape"][2]])), r"subject Phantom_0000: index\.json has shape"),
    "index: range": (edit_subject(lambda e: e["ranges"].update(t1=[-1.0, 1.0])), r"subject Phantom_0000: sequence t1: index\.json has the range"),
    "index: image size": (edit_subject(lambda e: e.update(shape=[n + 1 for n in e["shape"]])), r"subject Phantom_0000: image\.npy has \d+ bytes, which does not fit shape"),
    "other type": (replace_payload("brain.npy", npy_zeros("int8")), r"subject Phantom_0001: brain\.npy is int8"),
    "Fortran order": (replace_payload("brain.npy", npy_zeros("uint8", order="F")), r"brain\.npy cannot be decoded .*Fortran order"),
    "summary": (lambda f: edit_json(f / "fingerprint.json", lambda s: s.update(subjects=9)), r"fingerprint\.json: is about 9 subjects, index\.json lists 4"),
    "summary: text": (lambda f: (f / "fingerprint.json").write_text("{"), r"fingerprint\.json: cannot be read"),
    "index: volume": (edit_subject(lambda e: e["label_volume_ml"].update(ET=9.0)), r"subject Phantom_0000: index\.json has other label volumes"),
    "index: subject dropped": (edit_index(lambda s: s["subjects"].pop()), r"splits\.json: .* names subject 'Phantom_0001', which the data set does not have"),
    "index: subject twice": (edit_index(lambda s: s["subjects"].append(s["subjects"][0])), "lists subject Phantom_0000 twice"),
    "index: path": (edit_index(lambda s: s.update(file="../" + TAR)), r"index\.json: lists '\.\./phantom-000000\.tar', which is not a plain file name"),
    "index: key": (edit_index(lambda s: s.update(sha=1)), r"index\.json: shards\.0\.sha: Extra inputs"),
    "index: text": (lambda f: (f / "index.json").write_text("{"), r"index\.json: cannot be read, it is invalid JSON"),
    "index: gone": (lambda f: (f / "index.json").unlink(), r"index\.json is missing"),
    "splits: gone": (lambda f: (f / "splits.json").unlink(), r"splits\.json is missing"),
    "splits: unknown": (lambda f: edit_json(f / "splits.json", lambda s: s["test"].append("zz")), r"splits\.json: test names subject 'zz'"),
    "splits: leak": (lambda f: edit_json(f / "splits.json", lambda s: s["test"].append(s["folds"][0]["train"][0])), r"splits\.json: patient \w+ is in folds\.0\.train and in test"),
}  # fmt: skip


def test_sound_set_passes(sound):
    assert verify(sound) == read_index(sound)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        verify(folder)
    assert "\n" not in str(error.value)


def test_object_array_is_not_decoded(folder):
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    replace_payload("label.npy", stream.getvalue())(folder)
    with pytest.raises(UserError, match=r"label\.npy cannot be decoded"):
        verify(folder)


def break_all(folder):
    """Damage every tar, and add two that nobody knows."""
    flip_byte(folder, "image.npy")
    (folder / "phantom-000001.tar").unlink()
    for name in ("more.tar", "less.tar"):
        shutil.copy(folder / TAR, folder / name)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_damaged_tars_are_named_in_the_order_of_the_set(folder, workers):
    assert verify(folder, workers=workers) == read_index(folder)
    break_all(folder)
    with pytest.raises(UserError) as error:
        verify(folder, workers=workers)
    first, *lines = str(error.value).splitlines()
    assert first == f"{folder}: 4 of its tars are wrong:"
    expected = [TAR + ": changed", "phantom-000001.tar: no such file", "less.tar: not in index", "more.tar: not in index"]
    assert len(lines) == 4 and all(words in line for words, line in zip(expected, lines))


def test_of_many_damaged_tars_the_first_twenty_are_named(folder):
    for number in range(30):
        (folder / f"stray-{number:02d}.tar").write_bytes(b"")
    with pytest.raises(UserError) as error:
        verify(folder)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("30 of its tars are wrong:") and "stray-19" in lines[20] and lines[21:] == ["... and 10 more"]


def test_workers_below_one_are_refused(folder):
    with pytest.raises(UserError, match="workers 0: give 1 or more"):
        verify(folder, workers=0)


def test_the_order_of_a_subjects_members_is_the_indexs(folder):
    """Ours is image, brain, label, meta; what others wrote and `shards index` took in may be sorted by name."""

    def by_name(shard):
        for entry in shard["subjects"]:
            entry["members"] = dict(sorted(entry["members"].items()))

    rewrite(folder, lambda members: members.sort())
    with pytest.raises(UserError, match="not adjacent and in order"):
        verify(folder)
    edit_index(by_name)(folder)
    verify(folder)


def test_a_small_sound_set_of_another_writer_passes(tmp_path):
    verify(write_set(tmp_path / "tiny", [["a0", "a1"], ["b0"]], test=("a1",), val=("b0",)))
