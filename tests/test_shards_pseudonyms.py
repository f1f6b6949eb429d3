"""Pseudonyms: no key of the source in any byte of a set, one key per patient, and a way back for who holds the salt."""

import csv
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from nifti_trees import write_case

from mstkd.errors import UserError
from mstkd.shards.build import build
from mstkd.shards.parts import merge
from mstkd.shards.spec import read_index, read_splits
from mstkd.shards.verify import verify

MSTKD = str(Path(sys.executable).parent / "mstkd")
SPEC = """
name: clinic
description: two scans of some patients, at two sites
layout: flat
sequences: {t1: "{subject}_t1.nii.gz", t2: "{subject}_t2.nii.gz"}
label: "{subject}_seg.nii.gz"
label_scheme: brats2018
patient: "(.+)_[0-9]"
site: "([A-Z]+)-.*"
"""
KEYS = ["NORTH-Miller_1", "NORTH-Miller_2", "NORTH-Smith_1", "SOUTH-Jones_1", "SOUTH-Jones_2", "SOUTH-Brown_1"]
NAMES = ("Miller", "Smith", "Jones", "Brown")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    (folder / "clinic.yaml").write_text(SPEC)
    for seed, key in enumerate(KEYS):
        write_case(folder / "src", key, {name: f"{key}_{name}.nii.gz" for name in ("t1", "t2")}, seed, f"{key}_seg.nii.gz")
    return folder


def pseudonymised(given, out, **options):
    return build(given / "clinic.yaml", given / "src", out, subjects_per_shard=2, pseudonymise=True, **options)


def table_of(path):
    with path.open() as stream:
        return {row["subject"]: row for row in csv.DictReader(stream)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_no_original_key_is_in_any_byte_of_the_set(given, tmp_path):
    pseudonymised(given, tmp_path / "set")
    verify(tmp_path / "set")
    files = contents(tmp_path / "set")
    assert len(files) == 6
    for name, data in files.items():
        assert not any(key.encode() in data for key in NAMES), name
    table = table_of(tmp_path / "set.keys.csv")
    entries = read_index(tmp_path / "set").subjects()
    assert list(entries) == sorted(row["new_subject"] for row in table.values()) and sorted(table) == sorted(KEYS)
    assert all(key.startswith("S-") and len(key) == 18 and entry.patient.startswith("P-") for key, entry in entries.items())
    patients = {key: row["new_patient"] for key, row in table.items()}
    assert patients["NORTH-Miller_1"] == patients["NORTH-Miller_2"] != patients["NORTH-Smith_1"] and len(set(patients.values())) == 4
    for key, row in table.items():
        assert row["patient"] == key[:-2] and entries[row["new_subject"]].patient == row["new_patient"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mstkd-pseudonyms.salt", "set", "set.keys.csv"]
    for name in ("mstkd-pseudonyms.salt", "set.keys.csv"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert b'"NORTH"' in files["fingerprint.json"]  # the site stays


def test_the_salt_alone_decides(given, tmp_path):
    for name in ("one", "two"):
        pseudonymised(given, tmp_path / name)  # the second finds the first one's salt
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (tmp_path / "elsewhere").mkdir()
    pseudonymised(given, tmp_path / "elsewhere" / "set")
    assert not set(read_index(tmp_path / "elsewhere" / "set").subjects()) & set(read_index(tmp_path / "one").subjects())
    pseudonymised(given, tmp_path / "elsewhere" / "three", salt_file=tmp_path / "mstkd-pseudonyms.salt")
    assert contents(tmp_path / "elsewhere" / "three") == contents(tmp_path / "one")
    assert (tmp_path / "three.keys.csv").exists()  # next to the salt


def test_parts_share_one_salt_and_leave_no_key(given, tmp_path):
    words = [MSTKD, "shards", "build", "--spec", given / "clinic.yaml", "--src", given / "src", "--out", tmp_path / "set", "--pseudonymise"]
    parts = [subprocess.Popen([*map(str, words), "--subjects-per-shard", "2", "--part", f"{number}/3"]) for number in (1, 2, 3)]
    assert [part.wait() for part in parts] == [0, 0, 0]
    merge(tmp_path / "set")
    pseudonymised(given, tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_explicit_splits_are_given_by_the_original_keys(given, tmp_path):
    splits = tmp_path / "mine.json"
    splits.write_text(json.dumps({"folds": [{"train": KEYS[:2], "val": [KEYS[2]]}], "test": KEYS[3:]}))
    pseudonymised(given, tmp_path / "set", splits=splits)
    new = {key: row["new_subject"] for key, row in table_of(tmp_path / "set.keys.csv").items()}
    found = read_splits(tmp_path / "set")
    assert set(found.folds[0].train) == {new[key] for key in KEYS[:2]} and found.folds[0].val == (new[KEYS[2]],)
    assert set(found.test) == {new[key] for key in KEYS[3:]}
    verify(tmp_path / "set")


def test_a_bad_salt_is_refused(given, tmp_path):
    salt = tmp_path / "salt"
    with pytest.raises(UserError, match=r"salt .*: no such file; leave out --salt-file to have one made"):
        pseudonymised(given, tmp_path / "set", salt_file=salt)
    salt.write_text("short")
    salt.chmod(0o644)
    with pytest.raises(UserError, match=r"others may read it \(mode 644\); run chmod 600"):
        pseudonymised(given, tmp_path / "set", salt_file=salt)
    salt.chmod(0o600)
    with pytest.raises(UserError, match="5 bytes; give at least 16"):
        pseudonymised(given, tmp_path / "set", salt_file=salt)
    for inside in ("set", "set.partial"):
        with pytest.raises(UserError, match="lies inside the shard set"):
            pseudonymised(given, tmp_path / "set", salt_file=tmp_path / inside / "salt")
    assert [path.name for path in tmp_path.iterdir()] == ["salt"]


def test_the_table_of_another_set_is_never_overwritten(given, tmp_path):
    (tmp_path / "set.keys.csv").write_text("subject,patient\n")
    with pytest.raises(UserError, match=r"set\.keys\.csv: exists and leads to the keys of another set; move it away"):
        pseudonymised(given, tmp_path / "set")
    assert (tmp_path / "set.keys.csv").read_text() == "subject,patient\n"


def test_a_build_that_was_tried_before_completes_the_table(given, tmp_path):
    """A bad scan ends a build before anything is kept; the table stays and must not stand in the way of the next try."""
    src = tmp_path / "src"
    shutil.copytree(given / "src", src)
    scan = src / "SOUTH-Brown_1_t1.nii.gz"
    scan.write_bytes(scan.read_bytes()[:200])
    words = {"subjects_per_shard": 8, "pseudonymise": True}
    with pytest.raises(UserError, match="truncated or not a NIfTI"):
        build(given / "clinic.yaml", src, tmp_path / "set", **words)
    for name in ("t1", "t2", "seg"):
        (src / f"SOUTH-Brown_1_{name}.nii.gz").unlink()
    build(given / "clinic.yaml", src, tmp_path / "set", **words)
    table = tmp_path / "set.keys.csv"
    assert set(table_of(table)) == set(KEYS) and stat.S_IMODE(table.stat().st_mode) == 0o600
    assert {row["new_subject"] for key, row in table_of(table).items() if "Brown" not in key} == set(read_index(tmp_path / "set").subjects())
