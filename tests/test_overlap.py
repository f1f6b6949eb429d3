"""Subjects shared by training and the cases it is judged on: by patient and by content, within a set and across sets."""

import json
import logging
import tracemalloc
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from tiny_shards import SEQUENCES, write_set

from mstkd.config import DataConfig
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.evaluate import overlap
from mstkd.evaluate.overlap import find_overlap, refuse_overlap, training_overlap
from mstkd.shards import fingerprint
from mstkd.shards.build import build
from mstkd.shards.phantom import write_phantom
from mstkd.shards.spec import SubjectEntry, read_index

KEY = "Phantom_0004"


@dataclass
class Cohort:
    nifti: object
    folder: object
    scratch: object

    def copy_of(self, name, change, change_label=lambda voxels, affine: (voxels, affine)):
        """The index of a set that holds KEY alone, as Copy_0000, its voxels (X, Y, Z) and affine changed."""
        source, target = self.nifti / KEY, self.scratch / name / "Copy_0000"
        target.mkdir(parents=True)
        for file in source.iterdir():
            scan = nib.load(file)
            voxels = np.asanyarray(scan.dataobj)
            changed = (change_label if "seg" in file.name else change)(voxels, scan.affine)
            nib.save(nib.Nifti1Image(*changed), target / file.name.replace(KEY, "Copy_0000"))
        splits = target.parent / "splits.json"
        splits.write_text(json.dumps({"folds": [{"train": ["Copy_0000"], "val": ["Copy_0000"]}]}))
        build("phantom", target.parent, target.parent / "set", splits=splits, allow_overlap=True)
        return read_index(target.parent / "set")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    write_phantom(root / "nifti", subjects=20, size=32, seed=11)
    build("phantom", root / "nifti", root / "set")
    return Cohort(root / "nifti", root / "set", root)


def within_brain(change):
    return lambda voxels, affine: (np.where(voxels != 0, change(voxels.astype(np.float64)), 0).astype(np.float32), affine)


def to_int16(voxels, affine):
    changed, _ = within_brain(lambda v: np.maximum(np.round(v), 1))(voxels, affine)
    return changed.astype(np.int16), affine


def moved_box(voxels, affine):
    """A speck two voxels beyond the brain, as a looser skull stripping leaves one, moves the box and the origin."""
    wider = np.pad(voxels, 4)
    first = np.argwhere(wider)[0]
    wider[tuple(first - (2, 0, 0))] = wider[wider != 0].mean()
    return wider, affine


VARIANTS = {
    "another name": lambda voxels, affine: (voxels, affine),
    "int16": to_int16,
    "affine map": within_brain(lambda v: 0.37 * v + 90),
    "affine map, int16": lambda voxels, affine: to_int16(within_brain(lambda v: 0.37 * v + 90)(voxels, affine)[0], affine),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_subject_under_another_name_is_found(cohort, name):
    copy, ours = cohort.copy_of(name, VARIANTS[name]), read_index(cohort.folder)
    found = find_overlap(ours, list(ours.subjects()), copy, ["Copy_0000"])
    assert [(a, b) for a, b, _ in found] == [(KEY, "Copy_0000")] and "same image (" in found[0][2]


def test_a_moved_crop_box_hides_nobody(cohort):
    copy, ours = cohort.copy_of("moved box", moved_box, lambda voxels, affine: (np.pad(voxels, 4), affine)), read_index(cohort.folder)
    shapes = [copy.subjects()["Copy_0000"].shape, ours.subjects()[KEY].shape]
    assert shapes[0] != shapes[1], "the box did not move; the test tests nothing"
    assert [(a, b) for a, b, _ in find_overlap(ours, list(ours.subjects()), copy, ["Copy_0000"])] == [(KEY, "Copy_0000")]


def test_a_resampled_copy_is_out_of_reach(cohort):
    """Held here so that the README's words stay true: at this size such a copy correlates by 0.8 to 0.95."""
    coarser = np.diag([1.25, 1.25, 1.25, 1])

    def change(voxels, affine):
        brain = zoom((voxels != 0).astype(np.float32), 0.8, order=1) > 0.5
        return np.where(brain, np.maximum(zoom(voxels.astype(np.float32), 0.8, order=1), 1e-3), 0), affine @ coarser

    def change_label(voxels, affine):
        return zoom(voxels, 0.8, order=0), affine @ coarser

    copy, ours = cohort.copy_of("resampled", change, change_label), read_index(cohort.folder)
    assert find_overlap(ours, list(ours.subjects()), copy, ["Copy_0000"]) == []
    values = [correlation(ours.subjects()[KEY], copy.subjects()["Copy_0000"], name) for name in SEQUENCES]
    assert 0.5 < min(values) < max(values) < fingerprint.SAME_SUBJECT_CORRELATION


def test_twenty_different_subjects_are_twenty_subjects(cohort):
    index = read_index(cohort.folder)
    keys = list(index.subjects())
    found = find_overlap(index, keys, index, keys)
    assert [(a, b) for a, b, _ in found] == [(key, key) for key in keys]
    entries = list(index.subjects().values())
    largest = max(correlation(a, b, name) for i, a in enumerate(entries) for b in entries[:i] for name in index.sequences)
    print(f"largest correlation between different phantoms: {largest:.3f}")
    assert largest < 0.95  # far from 0.999: the threshold leaves room for real brains, which are more alike


def correlation(a, b, sequence):
    return float(np.corrcoef(fingerprint.decode(a.fingerprint[sequence]), fingerprint.decode(b.fingerprint[sequence]))[0, 1])


def test_a_cohort_with_its_twin_is_refused_across_sets(cohort):
    """Two sets, each sound in itself: what one trains on, the other tests."""
    other = cohort.scratch / "twin"
    for folder in sorted(cohort.nifti.iterdir()):
        for file in folder.iterdir():
            target = other / "nifti" / folder.name.replace("Phantom", "Twin") / file.name.replace("Phantom", "Twin")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    build("phantom", other / "nifti", other / "set", seed=5)
    stores = [ShardStore(cohort.folder), ShardStore(other / "set")]
    for store in stores:
        refuse_overlap([store], config(store))
    with pytest.raises(UserError, match=r"training subject Phantom_\d+ and val subject Twin_\d+: same image .*, in .*set and in .*twin/set .*data.allow_overlap") as error:
        refuse_overlap(stores, config(*stores))
    assert "\n" not in str(error.value)


def config(*stores, **fields):
    return DataConfig(shards=[{"path": str(store.folder)} for store in stores], crop=(8, 8, 8), **fields)


def split_up(folder, train, val, test=(), **fields):
    (folder / "splits.json").write_text(json.dumps({"folds": [{"train": train, "val": val}], "test": list(test), **fields}))
    return ShardStore(folder)


def with_patient(folder, subject, patient, drop=()):
    """Give a subject another patient; `drop` takes sequences from it."""
    values = json.loads((folder / "index.json").read_text())
    for shard in values["shards"]:
        for entry in shard["subjects"]:
            if entry["subject"] == subject:
                entry["patient"] = patient
                for name in drop:
                    entry["fingerprint"].pop(name)
                entry["sequences"] = [name for name in entry["sequences"] if name not in drop]
    (folder / "index.json").write_text(json.dumps(values))


def test_one_patient_on_two_sides_of_a_split_is_refused(tmp_path):
    folder = write_set(tmp_path / "s", [["a0", "a1", "b0"]])
    with_patient(folder, "a1", "a0")
    for train, val, test, words in ((["a0"], ["a1"], [], "and val subject a1"), (["a0"], ["b0"], ["a1"], "and test subject a1"),
                                    (["b0"], ["a0"], ["a1"], "training subject a0 and test subject a1")):  # fmt: skip
        store = split_up(folder, train, val, test)
        with pytest.raises(UserError, match=f"{words}: same patient a0"):
            refuse_overlap([store], config(store))


def test_what_is_allowed_is_logged(tmp_path, caplog):
    folder = write_set(tmp_path / "s", [["a0", "a1", "b0"]])
    with_patient(folder, "a1", "a0")
    store = split_up(folder, ["a0"], ["a1"], ["b0"])
    for said in (config(store, allow_overlap=True), None):
        if said is None:  # the splits of this one set say so themselves
            store = split_up(folder, ["a0"], ["a1"], ["b0"], allow_overlap=True)
            said = config(store)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mstkd"):
            refuse_overlap([store], said)
        assert [record.message for record in caplog.records] == ["ALLOWED OVERLAP: 1 subject(s) of the val split are in training too, e.g. a1"]
    assert training_overlap([store], 0, [store], "val").stated and not training_overlap([store], 0, [store], "val").unstated


def test_a_set_speaks_for_itself_alone(tmp_path):
    """`allow_overlap` in one set's splits.json excuses nothing between that set and another."""
    first = split_up(write_set(tmp_path / "a", [["a0", "a1"]]), ["a0"], ["a1"], allow_overlap=True)
    second = split_up(write_set(tmp_path / "b", [["a0", "b1"]]), ["b1"], ["a0"], allow_overlap=True)
    with pytest.raises(UserError, match="training subject a0 and val subject a0: same patient a0"):
        refuse_overlap([first, second], config(first, second))


def test_without_a_common_sequence_only_the_patient_counts(tmp_path):
    folder = write_set(tmp_path / "a", [["a0", "a1"]])
    with_patient(folder, "a0", "a0", drop=("t1", "t1ce", "t2"))
    other = write_set(tmp_path / "b", [["a0", "b1"]])  # the same voxels as the other set's a0
    with_patient(other, "a0", "someone", drop=("flair",))
    ours, theirs = read_index(folder), read_index(other)
    assert find_overlap(ours, ["a0", "a1"], theirs, ["a0", "b1"]) == []
    with_patient(other, "b1", "a0")
    assert find_overlap(ours, ["a0", "a1"], read_index(other), ["a0", "b1"]) == [("a0", "b1", "same patient a0")]


def test_sequences_are_compared_by_name_not_by_channel(tmp_path):
    ours = read_index(write_set(tmp_path / "a", [["a0"]]))
    other = write_set(tmp_path / "b", [["a0"]])
    values = json.loads((other / "index.json").read_text())
    entry = values["shards"][0]["subjects"][0]
    entry["patient"] = "someone"
    entry["fingerprint"] = dict(zip(SEQUENCES, reversed(entry["fingerprint"].values())))
    (other / "index.json").write_text(json.dumps(values))
    assert find_overlap(ours, ["a0"], read_index(other), ["a0"]) == []


def test_a_split_that_names_a_stranger_is_one_line(tmp_path):
    folder = write_set(tmp_path / "s", [["a0", "a1"]])
    with pytest.raises(UserError, match=r"splits\.json: .* names zz, which is not in index\.json"):
        split_up(folder, ["a0"], ["a1"], ["zz"])


@settings(max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), block=st.integers(1, 5), twins=st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=3))
def test_blocks_find_what_one_comparison_finds(monkeypatch_block, rows, columns, block, twins):
    draws = np.random.default_rng(0)
    first, second = entries(draws, rows, "a"), entries(draws, columns, "b")
    expected = set()
    for i, j in twins:
        if i < rows and j < columns and j not in {c for _, c in expected}:
            second[j] = second[j].model_copy(update={"fingerprint": first[i].fingerprint})
            expected.add((i, j))
    monkeypatch_block(block)
    assert {(i, j) for i, j, _ in overlap._shared(first, second)} == expected


@pytest.fixture(scope="module")
def monkeypatch_block():
    before = overlap.BLOCK_SUBJECTS
    yield lambda size: setattr(overlap, "BLOCK_SUBJECTS", size)
    overlap.BLOCK_SUBJECTS = before


def entries(draws, count, name):
    values = draws.standard_normal((count, 16, 16, 16))
    made = [{"flair": fingerprint.encode(volume)} for volume in values]
    return [SubjectEntry(subject=f"{name}{i}", patient=f"{name}{i}", sequences=("flair",), members={}, fingerprint=code) for i, code in enumerate(made)]


def test_memory_does_not_grow_with_the_sets(monkeypatch_block):
    monkeypatch_block(64)
    few = entries(np.random.default_rng(1), 64, "a")
    many = [few[i % 64].model_copy(update={"subject": f"b{i}", "patient": f"b{i}", "fingerprint": {}}) for i in range(960)] + entries(np.random.default_rng(2), 640, "c")

    def peak(second):
        tracemalloc.start()
        overlap._shared(few, second)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(many) < 1.5 * peak(many[-64:])
