"""Files that appear complete or not at all."""

import csv
import hashlib
import json
import math

import pytest

from mstkd.files import sha256_of, size_text, whole_file, whole_folder, write_csv, write_json, write_text


def test_what_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "noted.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError), whole_file(path) as stream:
        stream.write(b"half")
        raise ValueError
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    with pytest.raises(ValueError), whole_folder(tmp_path / "out") as folder:
        write_text(folder / "one", "1")
        raise ValueError
    assert [found.name for found in tmp_path.iterdir()] == ["noted.json"] and json.loads(path.read_text()) == {"a": 1}


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        write_text(folder / "one", "né\n")
        assert not (tmp_path / "out").exists()
    assert [found.name for found in tmp_path.iterdir()] == ["out"]
    assert sha256_of(tmp_path / "out" / "one") == hashlib.sha256("né\n".encode()).hexdigest()


def test_a_table_reads_back(tmp_path):
    write_csv(tmp_path / "t.csv", ("name", "dice"), [("a, b\nc", 0.5), ("d", None)])
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert [*csv.reader(stream)] == [["name", "dice"], ["a, b\nc", "0.5"], ["d", ""]]


def test_sizes_have_three_digits_and_a_binary_unit():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "0.977 KiB", 1536: "1.5 KiB", 4.74e9: "4.41 GiB", 999.7 * 2**20: "0.976 GiB"}
    assert {size: size_text(size) for size in sizes} == sizes
