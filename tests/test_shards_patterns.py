"""How patterns find files: wildcards, special characters, pairs, links."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_trees import PLAIN, REAL_NAMES, head, write_case, write_nifti, write_real_names

from mstkd.errors import UserError
from mstkd.shards.dataset import Volume, load_spec
from mstkd.shards.patterns import FilePattern

NAMES = st.text("ab_-7", min_size=1, max_size=4)


@given(NAMES, NAMES, NAMES, st.sampled_from([".nii.gz", ".nii"]))
def test_a_pattern_finds_the_subject_that_it_was_written_with(folder, subject, suffix, ending):
    pattern = FilePattern.parse(f"x{folder}*/{{subject}}/{{subject}}_{suffix}.nii.gz")
    path = f"x{folder}yz/{subject}/{subject}_{suffix}{ending}"
    assert list(pattern.subjects_of(f"/else/where/{path}"))[0] == subject
    assert list(pattern.subjects_of(f"x{folder}yz/{subject}/{subject}x_{suffix}{ending}"))[:1] != [subject]
    assert not list(pattern.subjects_of(path + ".txt"))


def test_patterns_take_special_characters_as_they_are(tmp_path):
    for name in ("a[1]_t1.nii.gz", "a1_t1.nii.gz", "ab_t1.nii.gz.bak", "x.1_t1.nii", ".hidden_t1.nii"):
        (tmp_path / name).write_bytes(b"")
    pattern = FilePattern.parse("{subject}_t1.nii")
    assert pattern.subjects(tmp_path) == {"a[1]", "a1", "x.1"}
    assert pattern.find(tmp_path, "a[1]") == Volume(tmp_path / "a[1]_t1.nii.gz")
    assert FilePattern.parse("*{subject}_t1.nii").find(tmp_path, "[1]") == Volume(tmp_path / "a[1]_t1.nii.gz")


def test_one_subject_in_two_folders_of_a_wildcard(tmp_path):
    for part in ("training", "testing"):
        write_nifti(tmp_path / f"{part}-images" / "1000_3.nii.gz", head(0))
    with pytest.raises(UserError, match=r"both testing-images/1000_3\.nii\.gz and training-images/1000_3\.nii\.gz exist"):
        load_spec("malc2012").find_cases(tmp_path)


def test_half_of_an_analyze_pair(tmp_path):
    write_real_names(tmp_path, next(names for names in REAL_NAMES if names.spec == "ibsr18_analyze"))
    (tmp_path / "IBSR_18/IBSR_18_ana_strip.hdr").unlink()
    with pytest.raises(UserError, match=r"IBSR_18_ana_strip\.img: its header IBSR_18_ana_strip\.hdr is not beside it"):
        load_spec("ibsr18_analyze").find_cases(tmp_path)


def test_a_linked_folder_counts_by_the_links_name(tmp_path):
    write_case(tmp_path / "store" / "scan17", "", {name: f"P_1_{name}.nii.gz" for name in PLAIN}, 0, "P_1_seg.nii.gz")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "P_1").symlink_to(tmp_path / "store" / "scan17", target_is_directory=True)
    (case,) = load_spec("phantom").find_cases(tmp_path / "src")
    assert case.subject == "P_1"
