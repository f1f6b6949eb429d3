"""Data set specs: each packaged one finds the files of its data set's real naming; bad specs and folders say what is wrong."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nifti_trees import PLAIN, REAL_NAMES, SHAPE, head, write_case, write_nifti, write_real_names

from mstkd.errors import UserError
from mstkd.shards.dataset import SPEC_FOLDER, Case, Volume, known_specs, load_spec
from mstkd.shards.labels import scheme_labels
from mstkd.shards.preprocess import preprocess
from mstkd.shards.scheme_check import check_scheme
from mstkd.shards.spec import LABEL_SCHEMES, LabelScheme

BRATS = tuple(PLAIN)


def named(subject, suffixes, ending=".nii.gz"):
    return {name: f"{subject}_{suffix}{ending}" for name, suffix in suffixes.items()}


def volume_at(src, text):
    path, _, channel = text.partition("#")
    return Volume(src / path, int(channel) if channel else None)


@pytest.mark.parametrize("names", REAL_NAMES, ids=str)
def test_packaged_spec_finds_the_real_names_and_stores_them(tmp_path, names):
    write_real_names(tmp_path, names)
    spec = load_spec(names.spec)
    (case,) = spec.find_cases(tmp_path)
    files = {sequence: volume_at(tmp_path, text) for sequence, text in names.files.items()}
    label = volume_at(tmp_path, names.label) if names.label else None
    assert case == Case(names.subject, names.patient, files, label, None, names.site, names.field_strength_t)
    assert list(case.files) == [name for name in spec.sequences if name in names.files]
    stored = preprocess(case, spec)
    assert stored.meta.sequences == tuple(case.files)
    assert (stored.meta.site, stored.meta.field_strength_t) == (names.site, names.field_strength_t)
    if names.label:
        counts = dict(zip(*np.unique(stored.label[stored.label > 0], return_counts=True)))
        expected = [value for value in names.label_values.values() if value]
        assert counts == {value: 36 * expected.count(value) for value in expected}  # 36: a layer of `blocks`


def test_every_packaged_spec_is_tried_above():
    assert {names.spec for names in REAL_NAMES} == set(known_specs())
    for path in SPEC_FOLDER.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert values["name"] == path.stem and values["description"] and values["licence"], path.name


def test_schemes_of_the_packaged_specs():
    assert {name: load_spec(name).scheme.name for name in known_specs() if load_spec(name).scheme} == {
        "phantom": "brats2018", "phantom_7t": "tissue3", "brats2018": "brats2018", "brats2019": "brats2018", "brats2020": "brats2018",
        "brats2021": "brats2018", "brats2023_gli": "brats2023", "brats2024_gli": "brats2024", "fets2022": "brats2018", "fets2024": "brats2018",
        "msd_task01": "msd_task01", "ibsr18": "tissue3", "ibsr18_analyze": "tissue3", "malc2012": "malc27", "paired_3t_7t": "tissue3",
    }  # fmt: skip
    assert load_spec("brats2018").scheme.regions["ET"] == (4,)
    assert load_spec("brats2023_gli").scheme.regions["ET"] == (3,)
    assert load_spec("brats2024_gli").scheme.values == (0, 1, 2, 3, 4)
    assert 4 not in load_spec("brats2024_gli").scheme.regions["WT"]
    msd = load_spec("msd_task01").scheme.regions
    assert (set(msd["WT"]), set(msd["TC"]), msd["ET"]) == ({1, 2, 3}, {2, 3}, (3,))


def test_the_27_structures_match_the_merges_of_the_sagittal_view():
    names = {values[0]: name for name, values in LABEL_SCHEMES["malc27"].regions.items()}
    merges = {1: 3, 2: 4, **{left: left + 13 for left in range(5, 12)}, 15: 25, 16: 26, 17: 27}  # left -> right
    assert all(names[left].removeprefix("left_") == names[right].removeprefix("right_") for left, right in merges.items())
    midline = set(names) - set(merges) - set(merges.values())
    assert {names[value] for value in midline} == {"third_ventricle", "fourth_ventricle", "brain_stem"}
    spec = load_spec("malc2012")
    assert set(spec.label_map.values()) == set(range(1, 28)) and spec.label_rest == 0
    assert {number % 2 for number, value in spec.label_map.items() if value == 2 and number >= 100} == {1}


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
    assert cases[0].files["t1"] == Volume(src / "a_1_t1.nii")
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
        ("site: 'x'\n", r"mine\.yaml:11: site: needs exactly one group \(\.\.\.\), which is the site"),
        ("field_strength_t: -3\n", r"mine\.yaml:11: field_strength_t: give tesla, a number above 0"),
        ("field_strength_t: {Guys: high}\n", r"mine\.yaml:11: field_strength_t: give tesla"),
        ("field_strength_t: {Guys: 1.5}\n", r"field_strength_t per site needs site"),
        ("label_rest: 0\n", r"label_rest is given without label_map"),
        ("label_map: {10: 3}\n", r"label_map: 10 becomes 3, which is not in scheme brats2018 \(0, 1, 2, 4\)"),
        ("label_map: {10: 1}\nlabel_rest: 3\n", r"label_map: label_rest becomes 3, which is not in scheme"),
        ("brain_mask: '{subject}_t1.nii'\n", r"two file patterns are the same"),
        ("brain_mask: mask.nii.gz\n", r"layout flat: every file pattern needs \{subject\}"),
        ("brain_mask: '{subject}_*.nii.gz'\n", r"'\{subject\}_\*\.nii\.gz' has \* and \{subject\} in one name"),
        ("brain_mask: '{sub}/m_{subject}.nii.gz'\n", r"\{sub\} stands for nothing; write \{subject\}"),
        ("brain_mask: '{subject}.nii.gz#one'\n", r"what follows # is the channel"),
        ("brain_mask: '/data/{subject}.nii.gz'\n", r"give a path below the folder"),
        ("preprocessing: {common_grid: t7}\n", r"common_grid: 't7' is no sequence; choose one of flair, t1"),
        ("preprocessing: {spacing_mm: [1, 0, 1]}\n", r"mine\.yaml:11: preprocessing\.spacing_mm\.1: .*greater than 0"),
    ],
)
def test_spec_file_errors(tmp_path, extra, message):
    with pytest.raises(UserError, match=message) as error:
        load_spec(flat_spec(tmp_path, extra))
    assert "\n" not in str(error.value)


def test_unknown_specs(tmp_path):
    with pytest.raises(UserError, match=re.escape("spec brats2017: unknown; known: brats2018, brats2019") + ".*, nnunet; or give a path"):
        load_spec("brats2017")
    with pytest.raises(UserError, match="no such file"):
        load_spec(tmp_path / "none.yaml")
    path = flat_spec(tmp_path)
    path.write_text(path.read_text().replace("brats2018", "brats2108"))
    with pytest.raises(UserError, match="label_scheme: no such label scheme; known: brats2018"):
        load_spec(path)


# one's own data set: what a YAML file can say


OWN = """
name: own
description: BIDS-like folders, one 4D file, masks, a label scheme of one's own
layout: folders
sequences:
  t1: "anat/{subject}_T1w.nii.gz"
  echo1: "anat/{subject}_multi.nii.gz#0"
  echo2: "anat/{subject}_multi.nii.gz#1"
brain_mask: "derivatives/{subject}_*_mask.nii.gz"
label: "anat/{subject}_lesions.nii.gz"
label_scheme:
  name: own_lesions
  values: [0, 1, 2]
  regions: {lesion: [1, 2], core: [2]}
  paint: {lesion: 1, core: 2}
label_map: {100: 1, 200: 2}
label_rest: 0
site: "sub-([A-Z]+)[0-9]+"
field_strength_t: {A: 3, B: 7}
patient: "sub-(.+)"
"""


def write_own(src, subject):
    mask = (head(0) != 0).astype(np.uint8)
    write_nifti(src / subject / "anat" / f"{subject}_T1w.nii.gz", head(0))
    write_nifti(src / subject / "anat" / f"{subject}_multi.nii.gz", np.stack([head(1), head(2)], axis=-1))
    write_nifti(src / subject / "derivatives" / f"{subject}_hd-bet_mask.nii.gz", mask)
    write_nifti(src / subject / "derivatives" / "report.nii.gz", mask)  # other files of a subject do not disturb
    label = np.zeros(SHAPE, np.uint8)
    label[10:14, 10:14, 8:10], label[10:14, 10:14, 10], label[10:14, 10:14, 11] = 100, 200, 30
    write_nifti(src / subject / "anat" / f"{subject}_lesions.nii.gz", label)


def test_a_data_set_of_ones_own_is_one_yaml_file(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    src = tmp_path / "src"
    for subject in ("sub-A01", "sub-B01"):
        write_own(src, subject)
    spec = load_spec(tmp_path / "own.yaml")
    first, second = spec.find_cases(src)
    assert (first.patient, first.site, first.field_strength_t) == ("A01", "A", 3) and second.field_strength_t == 7
    assert first.files["echo2"] == Volume(src / "sub-A01/anat/sub-A01_multi.nii.gz", 1)
    assert first.brain == Volume(src / "sub-A01/derivatives/sub-A01_hd-bet_mask.nii.gz")
    stored = preprocess(first, spec)
    assert np.bincount(stored.label.ravel())[1:].tolist() == [32, 16] and stored.meta.brain_from == "mask"
    again = type(spec).model_validate_json(spec.model_dump_json())
    assert again == spec and again.sha256() == spec.sha256()  # index.json carries the whole scheme


def test_own_data_set_errors(tmp_path):
    path, src = tmp_path / "own.yaml", tmp_path / "src"
    path.write_text(OWN)
    src.mkdir()
    with pytest.raises(UserError, match=r"no case of data set own; expected \{subject\}/anat/.*, \{subject\}/derivatives/\{subject\}_\*_mask"):
        load_spec(path).find_cases(src)
    write_own(src, "sub-C01")
    with pytest.raises(UserError, match=r"subject sub-C01: site C has no field_strength_t in data set own, only A, B"):
        load_spec(path).find_cases(src)
    path.write_text(OWN.replace("sub-([A-Z]+)[0-9]+", "(S[0-9])"))
    with pytest.raises(UserError, match=r"subject sub-C01: does not fit site: "):
        load_spec(path).find_cases(src)
    path.write_text(OWN.replace("sub-([A-Z]+)[0-9]+", "sub-(X?)C01"))  # fits, but finds no site
    with pytest.raises(UserError, match=r"subject sub-C01: does not fit site: "):
        load_spec(path).find_cases(src)
    path.write_text(OWN.replace("B: 7", "C: 7"))
    mask = src / "sub-C01/derivatives/sub-C01_hd-bet_mask.nii.gz"
    mask.with_name("sub-C01_b_mask.nii").write_bytes(b"")
    with pytest.raises(UserError, match=r"sub-C01: both derivatives/sub-C01_hd-bet_mask\.nii\.gz and derivatives/sub-C01_b_mask\.nii"):
        load_spec(path).find_cases(src)
    mask.unlink()
    mask.with_name("sub-C01_b_mask.nii").unlink()
    for complete in (True, False):  # intensities are normalised over it, so prediction needs it too
        with pytest.raises(UserError, match=r"subject sub-C01: no brain mask; expected .*sub-C01_\*_mask\.nii\.gz"):
            load_spec(path).find_cases(src, complete)


def scheme(**changes):
    regions, paint = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}, {"WT": 2, "TC": 1, "ET": 3}
    return {"name": "own", "values": (0, 1, 2, 3), "regions": regions, "paint": paint} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "brats2018"}, "label scheme 'brats2018' is a packaged one"),
        ({"values": (1, 2, 3)}, "0 (background) among them"),
        ({"values": (0, 1, 2, 2, 3)}, "each value once"),
        ({"values": (0, 1, 2, 3, 300)}, "300 is outside 0..255"),
        ({"regions": {}, "paint": {}}, "regions: name at least one"),
        ({"regions": {"WT": (1, 5)}, "paint": {"WT": 1}}, "regions.WT: 5 is not one of values"),
        ({"regions": {"WT": (0, 1)}, "paint": {"WT": 1}}, "regions.WT: name values above 0"),
        ({"regions": {"whole tumour": (1,)}, "paint": {"whole tumour": 1}}, "region name 'whole tumour'"),
        ({"paint": {"WT": 2, "TC": 1}}, "paint: needs exactly the regions WT, TC, ET"),
        ({"paint": {"WT": 2, "TC": 1, "ET": 7}}, "paint.ET: 7 is not one of values"),
        ({"paint": {"WT": 2, "TC": 3, "ET": 1}}, "a voxel of value 1 is in WT and TC and would be painted 3, which is in WT and TC and ET"),
        ({"regions": {"ET": (3,), "TC": (1, 3), "WT": (1, 2, 3)}}, "order the regions from the outermost to the innermost"),
        ({"regoins": {}}, "regoins: Extra inputs"),
        ({"values": "all"}, "values: Input should be a valid tuple"),
    ],
)
def test_inline_scheme_errors_name_line_and_fault(tmp_path, changes, message):
    path = flat_spec(tmp_path)
    path.write_text(path.read_text().replace("label_scheme: brats2018", f"label_scheme: {json.dumps(scheme(**changes))}"))
    with pytest.raises(UserError, match=r"mine\.yaml:10: label_scheme: .*" + re.escape(message)) as error:
        load_spec(path)
    assert "\n" not in str(error.value)


def painted(value, declared):
    """What painting the regions of a voxel, in order, leaves behind."""
    result = 0
    for region, values in declared.regions.items():
        result = declared.paint[region] if value in values else result
    return result


@given(st.data())
def test_a_scheme_passes_exactly_if_painting_keeps_every_region(data):
    values = (0, *range(1, data.draw(st.integers(2, 5))))
    regions = data.draw(st.dictionaries(st.sampled_from("ABC"), st.lists(st.sampled_from(values[1:]), min_size=1, unique=True), min_size=1))
    paint = {region: data.draw(st.sampled_from(values[1:])) for region in regions}
    declared = LabelScheme(name="own", values=values, regions=regions, paint=paint)
    kept = all({r for r in regions if v in regions[r]} == {r for r in regions if painted(v, declared) in regions[r]} for v in values)
    if kept:
        check_scheme(declared)
    else:
        with pytest.raises(ValueError, match="paint: a voxel of value"):
            check_scheme(declared)


def test_the_packaged_schemes_are_sound():
    for declared in LABEL_SCHEMES.values():
        check_scheme(declared)


# file patterns


def test_mgz_files(tmp_path):
    path = flat_spec(tmp_path)
    path.write_text(path.read_text().replace(".nii.gz", ".mgz"))
    for file in (*named("a", PLAIN, ".mgz").values(), "a_seg.mgz"):
        (tmp_path / "src").mkdir(exist_ok=True)
        nib.save(nib.MGHImage(head(0) if "seg" not in file else np.zeros(SHAPE, np.uint8), np.eye(4)), tmp_path / "src" / file)
    spec = load_spec(path)
    (case,) = spec.find_cases(tmp_path / "src")
    assert preprocess(case, spec).image.shape[0] == 4


def test_a_spec_may_not_take_the_name_of_a_packaged_one(tmp_path):
    """`predict` would find the packaged one by that name, and preprocess otherwise."""
    text = (SPEC_FOLDER / "phantom.yaml").read_text()
    (tmp_path / "copy.yaml").write_text(text)
    assert load_spec(tmp_path / "copy.yaml") == load_spec("phantom")
    (tmp_path / "other.yaml").write_text(text + "preprocessing: {spacing_mm: [4, 4, 4]}\n")
    with pytest.raises(UserError, match="'phantom' is the name of a packaged data set that differs"):
        load_spec(tmp_path / "other.yaml")


def test_a_spec_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="x.yaml: not a text file in UTF-8"):
        load_spec(tmp_path / "x.yaml")


@pytest.mark.parametrize("value", [float("nan"), 45.4, -7.0])
def test_a_rest_takes_whole_numbers_alone(value):
    spec = load_spec("malc2012")
    with pytest.raises(UserError, match="label values"):
        scheme_labels(np.array([0.0, 45.0, value]), spec, Volume(Path("seg.nii.gz")))
    assert scheme_labels(np.array([0.0, 45.0, 99.0]), spec, Volume(Path("seg.nii.gz"))).tolist() == [0, 1, spec.label_rest]
