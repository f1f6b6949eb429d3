"""Splits: by patient, disjoint, complete, stratified, a function of the data and the seed alone."""

import json
import pickle
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import write_set

from mstkd.errors import UserError
from mstkd.shards.dataset import load_spec
from mstkd.shards.layout import read_set
from mstkd.shards.spec import Fold, Splits, read_index, read_splits
from mstkd.shards.splits import check_splits, counted_splits, default_splits, leave_one_out, published_splits, read_explicit_splits


@st.composite
def cohorts(draw):
    """(subject -> patient, subject -> ml) with 1 to 3 scans per patient."""
    patients = {f"P{p}-{scan}": f"P{p}" for p in range(draw(st.integers(3, 40))) for scan in range(draw(st.integers(1, 3)))}
    volume = st.one_of(st.just(0.0), st.floats(0, 300))
    return patients, {subject: draw(volume) for subject in patients}


@given(cohorts(), st.integers(0, 100), st.randoms())
def test_default_splits(cohort, seed, rng: random.Random):
    patients, volumes = cohort
    splits = default_splits(patients, volumes, seed)
    check_splits(splits, patients, "default")  # nothing empty, unknown or on two sides
    test = set(splits.test)
    validated = [subject for fold in splits.folds for subject in fold.val]
    assert test and sorted(validated) == sorted(set(patients) - test)  # each one outside test is validated once
    for fold in splits.folds:
        assert set(fold.train) | set(fold.val) | test == set(patients)
    count = len(set(patients.values()))
    test_patients = len({patients[subject] for subject in test})
    assert abs(test_patients - 0.2 * count) <= 0.5
    assert len(splits.folds) == min(5, count - test_patients)
    shuffled = rng.sample(sorted(patients), len(patients))
    assert default_splits({s: patients[s] for s in shuffled}, volumes, seed) == splits


@given(st.integers(0, 1000))
def test_every_tercile_is_in_test_and_in_every_fold(seed):
    patients = {f"P{i:02d}": f"P{i:02d}" for i in range(60)}
    splits = default_splits(patients, {s: float(i) for i, s in enumerate(sorted(patients))}, seed)

    def per_tercile(keys):
        return [sum(int(key[1:]) // 20 == tercile for key in keys) for tercile in range(3)]

    assert per_tercile(splits.test) == [4, 4, 4]
    for fold in splits.folds:
        assert max(per_tercile(fold.val)) - min(per_tercile(fold.val)) <= 1


def test_seed_changes_the_splits_and_is_their_only_source_of_chance():
    patients = {f"P{i}": f"P{i}" for i in range(30)}
    volumes = dict.fromkeys(patients, 0.0)
    drawn = [default_splits(patients, volumes, seed) for seed in range(5)]
    assert len({splits.test for splits in drawn}) == 5
    assert drawn == [default_splits(patients, volumes, seed) for seed in range(5)]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_patients_ask_for_a_file(count):
    patients = {f"P0-{i}": f"P{i % count}" for i in range(6)}
    with pytest.raises(UserError, match=rf"{count} patient\(s\): too few .* --splits FILE"):
        default_splits(patients, dict.fromkeys(patients, 0.0), 0)


PATIENTS = {"a1": "a", "a2": "a", "b": "b", "c": "c"}


def explicit(tmp_path, train, val, test, **more):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"version": 1, "folds": [{"train": train, "val": val}], "test": test, **more}))
    return path


def test_explicit_splits_are_taken_as_they_are(tmp_path):
    splits = read_explicit_splits(explicit(tmp_path, ["a1", "a2"], ["b"], ["c"]), PATIENTS, allow_overlap=False)
    assert (splits.folds[0].train, splits.folds[0].val, splits.test) == (("a1", "a2"), ("b",), ("c",))


def test_subjects_that_no_split_names_are_counted(tmp_path, capsys):
    read_explicit_splits(explicit(tmp_path, ["a1", "a2"], ["b"], []), PATIENTS, allow_overlap=False)
    assert f"1 of {len(PATIENTS)} subjects are in no fold and not in test; nothing will use them" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("train", "val", "test", "message"),
    [
        (["a1"], ["zz"], [], r"folds\.0\.val names subject 'zz', which"),
        (["a1"], ["zz", "b", "yy"], [], r"folds\.0\.val names subjects 'zz', 'yy', which the data set does not have"),
        (["a1"], [f"z{i}" for i in range(7)], [], r"names subjects 'z0', 'z1', 'z2', 'z3', 'z4', \.\.\. \(7 in all\), which"),
        (["a1"], [], [], r"folds\.0\.val is empty"),
        (["b", "b"], ["c"], [], r"folds\.0\.train names subject 'b' twice"),
        (["a1"], ["a2"], [], r"patient a is in folds\.0\.train and in folds\.0\.val.*--allow-overlap"),
        (["a1"], ["b"], ["a2"], r"patient a is in folds\.0\.train and in test"),
        (["b"], ["c"], ["c"], r"patient c is in folds\.0\.val and in test"),
    ],
)
def test_explicit_splits_errors(tmp_path, train, val, test, message):
    with pytest.raises(UserError, match=message):
        read_explicit_splits(explicit(tmp_path, train, val, test), PATIENTS, allow_overlap=False)


def test_overlap_needs_a_statement_and_is_recorded(tmp_path):
    splits = read_explicit_splits(explicit(tmp_path, ["a1"], ["a1"], ["a1"]), PATIENTS, allow_overlap=True)
    assert splits.allow_overlap
    with pytest.raises(UserError, match="names subject 'zz'"):  # allowed overlap excuses nothing else
        read_explicit_splits(explicit(tmp_path, ["a1"], ["a1"], ["zz"]), PATIENTS, allow_overlap=True)


def test_files_that_are_no_splits(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_explicit_splits(tmp_path / "none.json", PATIENTS, allow_overlap=False)
    with pytest.raises(UserError, match=r"folds\.0\.tain"):
        path = tmp_path / "splits.json"
        path.write_text('{"folds": [{"tain": ["b"], "train": ["b"], "val": ["c"]}]}')
        read_explicit_splits(path, PATIENTS, allow_overlap=False)
    for text, message in [
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ("3", "none of the known forms: a splits.json with folds"),
        ('{"train": ["b"], "val": ["c"]}', "none of the known forms"),
        ('[{"train": ["b"]}]', r"fold 0\.val: Field required"),
        ('[{"train": "b", "val": []}]', r"fold 0\.train: Input should be a valid tuple"),
        ("[]", "no folds"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            read_explicit_splits(path, PATIENTS, allow_overlap=False)
        assert "\n" not in str(error.value)
    (tmp_path / "splits_final.pkl").write_bytes(pickle.dumps([{"train": ["b"], "val": ["c"]}]))
    with pytest.raises(UserError, match="a pickle, which is never opened"):
        read_explicit_splits(tmp_path / "splits_final.pkl", PATIENTS, allow_overlap=False)


# splits of other tools


@st.composite
def fold_plans(draw):
    """(splits, patients): k-fold cross-validation of up to 12 subjects and a test part, every subject a patient."""
    subjects = [f"BraTS2021_{i:05d}" for i in draw(st.lists(st.integers(0, 99999), min_size=3, max_size=12, unique=True))]
    count = draw(st.integers(2, min(5, len(subjects) - 1)))
    in_test = draw(st.integers(0, len(subjects) - count))
    test, rest = subjects[:in_test], subjects[in_test:]
    fold_of = {subject: i % count for i, subject in enumerate(rest)}
    folds = tuple(
        Fold(train=tuple(s for s in rest if fold_of[s] != k), val=tuple(s for s in rest if fold_of[s] == k)) for k in range(count)
    )
    return Splits(folds=folds, test=tuple(test)), {subject: subject for subject in subjects}, fold_of


def item(subject, folder, **more):
    files = [f"{folder}{subject}/{subject}_{name}.nii.gz" for name in ("flair", "t1ce", "t1", "t2")]
    return {"image": files, "label": f"{folder}{subject}/{subject}_seg.nii.gz", **more}


def imported(values, patients, dataset=None, allow_overlap=False):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made_elsewhere.json"
        path.write_text(json.dumps(values))
        return read_explicit_splits(path, patients, allow_overlap, dataset)


@given(fold_plans(), st.sampled_from(["", "TrainingData/", "./", "/data/brats/TrainingData/"]), st.booleans())
def test_all_forms_say_the_same(plan, folder, by_spec):
    splits, patients, fold_of = plan
    dataset = load_spec("brats2021") if by_spec else None
    assert imported(splits.model_dump(mode="json"), patients) == splits
    nnunet = [fold.model_dump(mode="json") for fold in splits.folds]
    assert imported(nnunet, patients) == splits.model_copy(update={"test": ()})
    training = [item(subject, folder, fold=fold) for subject, fold in fold_of.items()]
    datalist = {"name": "BraTS21", "training": training, "testing": [item(subject, folder) for subject in splits.test]}
    assert imported(datalist, patients, dataset) == splits
    first = splits.folds[0]
    pair = {
        "training": [item(s, folder) for s in first.train],
        "validation": [item(s, folder) for s in first.val],
        "test": [f"{folder}{s}/{s}_t1.nii.gz" for s in splits.test],
    }
    assert imported(pair, patients, dataset) == Splits(folds=(first,), test=splits.test)


def test_datalist_made_on_windows():
    folder = "D:\\TrainingData\\"
    windows = [{"image": f"{folder}{s}\\{s}_t1.nii.gz", "fold": i} for i, s in enumerate(("BraTS2021_00001", "BraTS2021_00002"))]
    for dataset in (load_spec("brats2021"), None):
        assert imported({"training": windows}, SUBJECTS, dataset).folds[0].val == ("BraTS2021_00001",)


def test_datalist_of_4d_files_and_of_folders_without_the_subject_in_the_names(tmp_path):
    keys = {f"BRATS_{i:03d}": f"BRATS_{i:03d}" for i in range(3)}
    items = [{"image": f"./imagesTr/{key}.nii.gz", "label": f"./labelsTr/{key}.nii.gz", "fold": i} for i, key in enumerate(keys)]
    decathlon = {"training": items}
    for dataset in (load_spec("msd_task01"), None):
        assert [fold.val for fold in imported(decathlon, keys, dataset).folds] == [(key,) for key in keys]
    (tmp_path / "own.yaml").write_text(
        "name: own\ndescription: the folder is the subject\nlayout: folders\nlabels: none\n"
        "sequences: {t1: anat/t1.nii.gz, t2: anat/t2.nii.gz}\n"
    )
    listed = {"training": [{"image": f"d/{key}/anat/t1.nii.gz", "fold": i} for i, key in enumerate(keys)]}
    assert [fold.val for fold in imported(listed, keys, load_spec(tmp_path / "own.yaml")).folds] == [(key,) for key in keys]


SUBJECTS = {"BraTS2021_00001": "p", "BraTS2021_00002": "q", "BraTS2021_00003": "p"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": [item("BraTS2021_00001", ""), item("BraTS2021_00002", "")]}, "neither fold numbers under training nor a validation list"),
        ({"training": [item("BraTS2021_00001", "", fold=0), item("BraTS2021_00002", "")]}, r"training\.1: has no fold number"),
        ({"training": [item("BraTS2021_00001", "", fold="0")]}, r"training\.0: has no fold number"),
        ({"training": [item("BraTS2021_00001", "", fold=0)], "validation": [item("BraTS2021_00002", "")]}, "both fold numbers and a validation list"),
        ({"training": {"image": "x.nii.gz"}}, "training: expected a list"),
        ({"training": [{"image": "x/y_flair.nii.gz", "fold": 0}]}, r"training\.0 \(x/y_flair\.nii\.gz\): no subject of the data set has such a file"),
        ({"training": [{"age": 3, "fold": 0}]}, r"training\.0 \(no file path\)"),
        ({"training": [{"image": f"{i}.nii.gz", "fold": 0} for i in range(9)]}, r"training\.4 \(4\.nii\.gz\), \.\.\. \(9 in all\)"),
        (
            {"training": [{"image": item("BraTS2021_00001", "")["image"], "label": item("BraTS2021_00002", "")["label"], "fold": 0}]},
            r"training\.0: its files fit the subjects BraTS2021_00001 and BraTS2021_00002",
        ),
        (
            {"training": [item("BraTS2021_00001", "", fold=0), item("BraTS2021_00001", "", fold=0), item("BraTS2021_00002", "", fold=1)]},
            "names subject 'BraTS2021_00001' twice",
        ),
        (
            {"training": [item("BraTS2021_00001", "", fold=0), item("BraTS2021_00002", "", fold=1)], "testing": [item("BraTS2021_00003", "")]},
            r"patient p is in folds\.0\.val and in test; move one, or state --allow-overlap",
        ),
        ([{"train": ["BraTS2021_00001"], "val": ["BraTS2021_00003"]}], r"patient p is in folds\.0\.train and in folds\.0\.val"),
        ([{"train": ["BraTS2021_00001"], "val": ["BraTS2021_99999"]}], r"folds\.0\.val names subject 'BraTS2021_99999', which"),
    ],
)
def test_imported_splits_errors(values, message):
    with pytest.raises(UserError, match=message) as error:
        imported(values, SUBJECTS, load_spec("brats2021"))
    assert "\n" not in str(error.value) and "made_elsewhere.json" in str(error.value)


def test_imported_overlap_needs_a_statement():
    splits = imported([{"train": ["BraTS2021_00001"], "val": ["BraTS2021_00003"]}], SUBJECTS, allow_overlap=True)
    assert splits.allow_overlap and splits.folds[0].val == ("BraTS2021_00003",)


def test_counted_splits_have_the_sizes_asked_for_and_keep_patients_together(phantom_shards, tmp_path):
    index = read_index(phantom_shards)
    patients = {key: entry.patient for key, entry in index.subjects().items()}
    whole = len(patients)
    splits = counted_splits(phantom_shards, whole - 3, 1, 2, seed=4)
    check_splits(splits, patients, "counted")
    assert (len(splits.folds), len(splits.folds[0].train), len(splits.folds[0].val), len(splits.test)) == (1, whole - 3, 1, 2)
    assert splits == counted_splits(phantom_shards, whole - 3, 1, 2, seed=4) != counted_splits(phantom_shards, whole - 3, 1, 2, seed=5)


def test_counted_splits_within_parts_of_the_sets_own(phantom_shards):
    own = read_splits(phantom_shards)
    held_out = {*own.folds[0].val, *own.test}
    splits = counted_splits(phantom_shards, len(held_out) - 2, 1, 1, within=("val", "test"))
    assert {*splits.folds[0].train, *splits.folds[0].val, *splits.test} == held_out and not held_out & {*own.folds[0].train}
    everything = counted_splits(phantom_shards, len(own.folds[0].val) - 1, 1, len(own.test), within=("val", "test"))
    assert set(everything.test) == {*own.test}  # a validation subject of what came before never gets into the test
    with pytest.raises(UserError, match=f"--test {len(own.test) + 1}: "):
        counted_splits(phantom_shards, 1, 1, len(own.test) + 1, within=("val", "test"))


def test_counted_splits_errors(phantom_shards):
    with pytest.raises(UserError, match="--train 500: .* subjects to choose from, and only"):
        counted_splits(phantom_shards, 500, 1, 1)
    with pytest.raises(UserError, match="--within valid: choose of train, val, test"):
        counted_splits(phantom_shards, 1, 1, 1, within=("valid",))


def test_counted_splits_part_no_patient(tmp_path):
    folder = tmp_path / "set"
    write_set(folder, [[f"p{number // 2}-{number % 2}" for number in range(8)]], val=("p0-0",))
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"][0]["subjects"]:
        entry["patient"] = entry["subject"].partition("-")[0]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="--test 1: 8 subjects to choose from, and only 0"):
        counted_splits(folder, 4, 2, 1)
    splits = counted_splits(folder, 4, 2, 2)
    assert [len({key.partition("-")[0] for key in part}) for part in (splits.folds[0].train, splits.folds[0].val, splits.test)] == [2, 1, 1]


# folds that leave one out, and published splits


def test_leaving_one_out_tests_on_everybody_once_and_chooses_by_somebody_else(phantom_shards, tmp_path):
    from mstkd.data.store import ShardStore
    from mstkd.evaluate.source import CaseSource

    splits = leave_one_out(phantom_shards, seed=2)
    index, _ = read_set(phantom_shards)
    people = sorted(index.subjects())
    assert len(splits.folds) == len(people) and splits.test == ()
    assert sorted(key for fold in splits.folds for key in fold.test) == people == sorted(key for fold in splits.folds for key in fold.val)
    for fold in splits.folds:
        assert sorted((*fold.train, *fold.val, *fold.test)) == people and len(fold.val) == len(fold.test) == 1
    check_splits(splits, {key: key for key in people}, "here")
    assert splits == leave_one_out(phantom_shards, seed=2) != leave_one_out(phantom_shards, seed=3)
    copy = shutil.copytree(phantom_shards, tmp_path / "copy")
    (copy / "splits.json").write_text(splits.model_dump_json())
    source = CaseSource([ShardStore(copy)])
    assert source.subjects("test", 1) == list(splits.folds[1].test) != source.subjects("test", 0)


def test_a_fold_may_not_test_on_whom_it_trains_on():
    splits = Splits(folds=(Fold(train=("a", "b"), val=("c",), test=("b",)),))
    with pytest.raises(UserError, match="patient b is in folds.0.train and in folds.0.test"):
        check_splits(splits, {key: key for key in "abc"}, "here")


def test_a_fold_without_a_test_of_its_own_is_written_as_ever():
    assert Fold(train=("a",), val=("b",)).model_dump_json() == '{"train":["a"],"val":["b"]}'


@pytest.mark.parametrize(("name", "sizes"), [("ibsr18", (7, 3, 8)), ("ibsr18_analyze", (7, 3, 8)), ("malc2012", (10, 5, 15))])
def test_published_splits_are_disjoint(name, sizes):
    splits = Splits.model_validate_json(published_splits(name).read_text())
    [fold] = splits.folds
    assert (len(fold.train), len(fold.val), len(splits.test)) == sizes
    everybody = {*fold.train, *fold.val, *splits.test}
    check_splits(splits, {key: key for key in everybody}, name)
    if name != "malc2012":
        assert everybody == {f"IBSR_{number:02d}" for number in range(1, 19)}


def test_no_published_split_is_one_line():
    with pytest.raises(UserError, match="--splits published: none is packaged for data set phantom; there are ibsr18, ibsr18_analyze, malc2012"):
        published_splits("phantom")
