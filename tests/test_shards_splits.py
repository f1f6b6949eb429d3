"""Splits: by patient, disjoint, complete, stratified, a function of the data and the seed alone."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstkd.errors import UserError
from mstkd.shards.splits import check_splits, default_splits, read_explicit_splits


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


@pytest.mark.parametrize(
    ("train", "val", "test", "message"),
    [
        (["a1"], ["zz"], [], r"folds\.0\.val names subject 'zz'"),
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
    with pytest.raises(UserError, match="Invalid JSON"):
        path.write_text("{")
        read_explicit_splits(path, PATIENTS, allow_overlap=False)
