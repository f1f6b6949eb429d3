"""Data set specs: each packaged one finds the files of its data set's real naming; bad specs and folders say what is wrong."""

import re

import pytest
from nifti_trees import write_case

from mstkd.errors import UserError
from mstkd.shards.dataset import Case, known_specs, load_spec

BRATS = ("flair", "t1", "t1ce", "t2")


def named(subject, suffixes, separator="_", ending=".nii.gz"):
    return {name: f"{subject}{separator}{suffix}{ending}" for name, suffix in suffixes.items()}


PLAIN = dict(zip(BRATS, BRATS))
GLI = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
# spec, folder below src, subject, patient, files, label file
REAL_NAMES = [
    ("phantom", ".", "Phantom_0003", "Phantom_0003", named("Phantom_0003", PLAIN), "Phantom_0003_seg.nii.gz"),
    ("phantom_7t", ".", "P_1", "P_1", named("P_1", {"t1_3t": "t1_3t", "t1_7t": "t1_7t"}), "P_1_seg.nii.gz"),
    ("brats2018", "HGG", "Brats18_TCIA08_105_1", "Brats18_TCIA08_105", named("Brats18_TCIA08_105_1", PLAIN), "Brats18_TCIA08_105_1_seg.nii.gz"),
    ("brats2020", ".", "BraTS20_Training_001", "BraTS20_Training_001", named("BraTS20_Training_001", PLAIN, ending=".nii"), "BraTS20_Training_001_seg.nii"),
    ("brats2020", ".", "BraTS20_Training_355", "BraTS20_Training_355", named("BraTS20_Training_355", PLAIN, ending=".nii"), "W39_1998.09.19_Segm.nii"),
    ("brats2023_gli", ".", "BraTS-GLI-00005-100", "BraTS-GLI-00005", named("BraTS-GLI-00005-100", GLI, "-"), "BraTS-GLI-00005-100-seg.nii.gz"),
    ("brats2024_gli", ".", "BraTS-GLI-02105-101", "BraTS-GLI-02105", named("BraTS-GLI-02105-101", GLI, "-"), "BraTS-GLI-02105-101-seg.nii.gz"),
    ("fets2024", ".", "FeTS2022_01341", "FeTS2022_01341", named("FeTS2022_01341", PLAIN), "FeTS2022_01341_seg.nii.gz"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "below", "subject", "patient", "files", "label"), REAL_NAMES)
def test_packaged_spec_finds_the_real_names(tmp_path, name, below, subject, patient, files, label):
    folder = tmp_path / below / subject
    write_case(folder, subject, files, 0, label)
    expected = Case(subject, patient, {sequence: folder / file for sequence, file in files.items()}, folder / label)
    spec = load_spec(name)
    assert spec.find_cases(tmp_path) == [expected]
    assert list(spec.sequences) == list(expected.files)


def test_every_packaged_spec_is_tried_above():
    assert {row[0] for row in REAL_NAMES} == set(known_specs())


def test_schemes_of_the_packaged_specs():
    assert load_spec("brats2018").scheme.regions["ET"] == (4,)
    assert load_spec("brats2023_gli").scheme.regions["ET"] == (3,)
    assert load_spec("brats2024_gli").scheme.values == (0, 1, 2, 3, 4)
    assert 4 not in load_spec("brats2024_gli").scheme.regions["WT"]


def flat_spec(tmp_path, extra=""):
    lines = "\n".join(f'  {name}: "{{subject}}_{name}.nii.gz"' for name in BRATS)
    path = tmp_path / "mine.yaml"
    path.write_text(f'name: mine\ndescription: flat folder\nlayout: flat\nsequences:\n{lines}\nlabel: "{{subject}}_seg.nii.gz"\nlabel_scheme: brats2018\n{extra}')
    return path


def write_flat(src, subject, sequences=BRATS, label=True, ending=".nii.gz"):
    write_case(src, subject, named(subject, {name: name for name in sequences}, ending=ending), 1, f"{subject}_seg.nii.gz" if label else None)


def test_flat_folder_is_sorted_and_takes_either_ending(tmp_path):
    src = tmp_path / "src"
    write_flat(src, "b-2")
    write_flat(src, "a_1", ending=".nii")
    cases = load_spec(flat_spec(tmp_path)).find_cases(src)
    assert [case.subject for case in cases] == ["a_1", "b-2"]
    assert cases[0].files["t1"] == src / "a_1_t1.nii"
    assert list(cases[0].files) == list(BRATS)


def test_prediction_takes_any_subset_without_a_label(tmp_path):
    src = tmp_path / "src"
    write_flat(src, "a", sequences=("t2", "flair"), label=False)
    spec = load_spec(flat_spec(tmp_path))
    (case,) = spec.find_cases(src, require_complete=False)
    assert list(case.files) == ["flair", "t2"] and case.label is None
    with pytest.raises(UserError, match=r"subject a: no t1; expected .*a_t1\.nii\.gz"):
        spec.find_cases(src)


def test_allow_missing_lets_subjects_lack_sequences(tmp_path):
    src = tmp_path / "src"
    write_flat(src, "a", sequences=("t2",))
    (case,) = load_spec(flat_spec(tmp_path, "allow_missing: true\n")).find_cases(src)
    assert list(case.files) == ["t2"]


def test_label_without_any_sequence_is_no_case(tmp_path):
    src = tmp_path / "src"
    write_flat(src, "a")
    write_flat(src, "b", sequences=())
    with pytest.raises(UserError, match="subject b: no flair"):
        load_spec(flat_spec(tmp_path)).find_cases(src, require_complete=False)


def test_required_and_optional_labels(tmp_path):
    src = tmp_path / "src"
    write_flat(src, "a", label=False)
    with pytest.raises(UserError, match=r"subject a: no label; expected .*a_seg\.nii\.gz"):
        load_spec(flat_spec(tmp_path)).find_cases(src)
    (case,) = load_spec(flat_spec(tmp_path, "labels: optional\n")).find_cases(src)
    assert case.label is None


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda src: None, "no such folder"),
        (lambda src: src.mkdir(), r"no case of data set mine; expected \{subject\}_flair\.nii\.gz, .*\(\.nii or \.nii\.gz\)"),
        (lambda src: write_flat(src, "a.1"), r"subject 'a\.1' cannot be a key; rename it"),
        (lambda src: [write_flat(src, "a"), write_flat(src, "a", label=False, ending=".nii")], r"both a_flair\.nii\.gz and a_flair\.nii exist"),
    ],
)
def test_folder_errors(tmp_path, prepare, message):
    prepare(tmp_path / "src")
    with pytest.raises(UserError, match=message) as error:
        load_spec(flat_spec(tmp_path)).find_cases(tmp_path / "src")
    assert "\n" not in str(error.value)


def test_subject_in_two_folders_and_misnamed_files(tmp_path):
    for grade in ("HGG", "LGG"):
        write_case(tmp_path / "twice" / grade / "Brats18_A_1", "", named("Brats18_A_1", PLAIN), 0, "Brats18_A_1_seg.nii.gz")
    with pytest.raises(UserError, match="subject Brats18_A_1: two folders"):
        load_spec("brats2018").find_cases(tmp_path / "twice")
    write_case(tmp_path / "misnamed" / "Brats18_A_1", "", named("A_1", PLAIN), 0, None)
    with pytest.raises(UserError, match=r"Brats18_A_1: holds NIfTI files, but none that data set brats2018 names"):
        load_spec("brats2018").find_cases(tmp_path / "misnamed")


def test_patient_rule_must_fit(tmp_path):
    write_case(tmp_path / "X_1", "", named("X_1", PLAIN), 0, "X_1_seg.nii.gz")
    with pytest.raises(UserError, match="subject X_1: does not fit patient"):
        load_spec("brats2018").find_cases(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("labls: none\n", r"mine\.yaml:11: unknown key labls; did you mean 'labels'\?"),
        ("patient: 'x[0-9]+'\n", r"mine\.yaml:11: patient: needs exactly one group"),
        ("patient: '(x'\n", r"mine\.yaml:11: patient: not a regular expression"),
        ("labels: none\n", "labels: none, but label or label_scheme is given"),
        ("label_exceptions: {a: b.png}\n", r"file pattern 'b\.png' does not end in \.nii\.gz or \.nii"),
    ],
)
def test_spec_file_errors(tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        load_spec(flat_spec(tmp_path, extra))


def test_unknown_specs(tmp_path):
    with pytest.raises(UserError, match=re.escape("spec brats2017: unknown; known: brats2018, brats2020")):
        load_spec("brats2017")
    with pytest.raises(UserError, match="no such file"):
        load_spec(tmp_path / "none.yaml")
    path = flat_spec(tmp_path)
    path.write_text(path.read_text().replace("brats2018", "brats2108"))
    with pytest.raises(UserError, match="label_scheme: no such label scheme; known: brats2018"):
        load_spec(path)
