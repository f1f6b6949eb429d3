"""The `nnunet` spec: folders as nnU-Net's versions 1 and 2 and the Decathlon make them, their labels, and what is refused."""

import json

import numpy as np
import pytest
import yaml
from nifti_trees import SHAPE, blocks, head, write_nifti

from mstkd.errors import UserError
from mstkd.shards.build import build
from mstkd.shards.dataset import Volume, known_specs, load_spec
from mstkd.shards.preprocess import preprocess

V2 = {
    "channel_names": {"0": "FLAIR", "1": "T1", "2": "T1 (Gd)", "3": "T2"},
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3},
    "regions_class_order": [1, 2, 3],
    "numTraining": 3,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
}
V1 = {
    "name": "BRATS", "tensorImageSize": "4D", "licence": "CC-BY-SA 4.0", "numTraining": 3, "numTest": 1,
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    "training": [{"image": f"./imagesTr/BRATS_{i:03d}.nii.gz", "label": f"./labelsTr/BRATS_{i:03d}.nii.gz"} for i in range(3)],
    "test": ["./imagesTs/BRATS_003.nii.gz"],
}  # fmt: skip
KEYS = ["FLAIR", "T1", "T1_Gd", "T2"]


def write_folder(folder, description, cases=3, name="BRATS_{:03d}", ending=".nii.gz", part="Tr", channels=4):
    for case in range(cases):
        for channel in range(channels):
            write_nifti(folder / f"images{part}" / f"{name.format(case)}_{channel:04d}{ending}", head(case * 10 + channel))
        write_nifti(folder / f"labels{part}" / f"{name.format(case)}{ending}", blocks((1, 2, 3)))
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "Dataset137_BraTS2021", V2)


def described(folder, change=(), drop=()):
    """Rewrite dataset.json with keys changed or dropped."""
    path = folder / "dataset.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(values | dict(change)))
    return folder


def test_version_2_with_regions(folder, caplog):
    spec = load_spec("nnunet", folder)
    assert (spec.name, list(spec.sequences)) == ("Dataset137_BraTS2021", KEYS)
    assert spec.scheme.regions == {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)}
    assert spec.scheme.paint == {"whole_tumor": 1, "tumor_core": 2, "enhancing_tumor": 3} and spec.scheme.values == (0, 1, 2, 3)
    for said in (caplog.text, spec.description):
        assert "channel 2 'T1 (Gd)' is called T1_Gd" in said and "label 'whole tumor' is called whole_tumor" in said
        assert "'FLAIR'" not in said  # unchanged
    cases = spec.find_cases(folder)
    assert [case.subject for case in cases] == ["BRATS_000", "BRATS_001", "BRATS_002"] == [case.patient for case in cases]
    assert cases[1].files["T1_Gd"] == Volume(folder / "imagesTr/BRATS_001_0002.nii.gz")
    assert cases[1].label == Volume(folder / "labelsTr/BRATS_001.nii.gz")
    stored = preprocess(cases[0], spec)
    assert np.bincount(stored.label.ravel())[1:].tolist() == [36, 36, 36] and stored.meta.sequences == tuple(KEYS)


def test_regions_keep_nnunets_order_of_painting(folder):
    described(folder, {"labels": {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}, "regions_class_order": [1, 3, 2]})
    scheme = load_spec("nnunet", folder).scheme
    assert list(scheme.regions) == ["kidney", "masses", "tumor"] and scheme.paint == {"kidney": 1, "masses": 3, "tumor": 2}


def test_plain_labels_and_another_ending(tmp_path):
    description = {**V2, "labels": {"background": 0, "GM": 1, "WM": 2, "CSF": 3}, "file_ending": ".nii"}
    del description["regions_class_order"]
    folder = write_folder(tmp_path / "Dataset 5 (test)", description, ending=".nii")
    spec = load_spec("nnunet", folder)
    assert spec.scheme.regions == {"GM": (1,), "WM": (2,), "CSF": (3,)} and spec.name == spec.scheme.name == "Dataset_5_test_"
    assert spec.find_cases(folder)[0].files["T1"].path.name == "BRATS_000_0001.nii"


def test_version_1_with_one_file_per_channel(tmp_path):
    folder = write_folder(tmp_path / "Task500_Brain", V1)
    spec = load_spec("nnunet", folder)
    assert list(spec.sequences) == ["FLAIR", "T1w", "t1gd", "T2w"] and spec.licence == "CC-BY-SA 4.0"
    assert spec.scheme.regions == {"edema": (1,), "non_enhancing_tumor": (2,), "enhancing_tumour": (3,)}
    assert len(spec.find_cases(folder)) == 3


def test_the_decathlons_folders_with_4d_files(tmp_path):
    folder = tmp_path / "Task01_BrainTumour"
    for case in range(3):
        write_nifti(folder / "imagesTr" / f"BRATS_{case:03d}.nii.gz", np.stack([head(case * 10 + k) for k in range(4)], axis=-1))
        write_nifti(folder / "labelsTr" / f"BRATS_{case:03d}.nii.gz", blocks((1, 2, 3)))
    write_nifti(folder / "imagesTs" / "BRATS_003.nii.gz", np.zeros((*SHAPE, 4), np.int16))
    (folder / "dataset.json").write_text(json.dumps(V1))
    spec = load_spec("nnunet", folder)
    cases = spec.find_cases(folder)
    assert [case.subject for case in cases] == ["BRATS_000", "BRATS_001", "BRATS_002"]
    assert cases[2].files["t1gd"] == Volume(folder / "imagesTr/BRATS_002.nii.gz", 2)
    packaged = load_spec("msd_task01").find_cases(folder)  # the same volumes under our own names
    assert [list(case.files.values()) for case in packaged] == [list(case.files.values()) for case in cases]
    (test,) = load_spec("nnunet", folder / "imagesTs").find_cases(folder / "imagesTs", require_complete=False)
    assert test.subject == "BRATS_003" and test.files["T2w"] == Volume(folder / "imagesTs/BRATS_003.nii.gz", 3)


@pytest.mark.parametrize("relative", [False, True])
def test_images_for_prediction(folder, monkeypatch, relative):
    write_folder(folder, V2, cases=1, name="NEW_{:03d}", part="Ts")
    (folder / "imagesTs/NEW_000_0001.nii.gz").unlink()
    src = folder / "imagesTs"
    if relative:
        monkeypatch.chdir(src)
        src = type(src)(".")
    spec = load_spec("nnunet", src)
    (case,) = spec.find_cases(src, require_complete=False)
    assert spec.labels == "optional" and case.subject == "NEW_000" and list(case.files) == ["FLAIR", "T1_Gd", "T2"]
    assert case.files["FLAIR"].path == src / "NEW_000_0000.nii.gz"
    assert case.label.path.resolve() == (folder / "labelsTs/NEW_000.nii.gz").resolve()


def test_the_labels_folder_as_reference(folder):
    spec = load_spec("nnunet", folder / "labelsTr")
    assert spec.scheme == load_spec("nnunet", folder).scheme
    assert [case.label.path for case in spec.find_cases(folder / "labelsTr", False)] == sorted((folder / "labelsTr").iterdir())


def test_images_of_any_folder_beside_a_copy_of_dataset_json(folder, tmp_path):
    new = tmp_path / "new patients"
    write_nifti(new / "P1_0000.nii.gz", head(0))
    (new / "dataset.json").write_text((folder / "dataset.json").read_text())
    spec = load_spec("nnunet", new)
    (case,) = spec.find_cases(new, require_complete=False)
    assert list(case.files) == ["FLAIR"] and case.label is None and spec.labels == "none"


def test_same_names_and_odd_names_become_different_keys(folder):
    described(folder, {"channel_names": {"0": "MRI", "1": "MRI", "10": "T2*", "2": "()"}})
    spec = load_spec("nnunet", folder)
    assert list(spec.sequences) == ["MRI_0", "MRI_1", "channel_2", "T2"]  # in the channels' order, not the file's
    assert spec.sequences["T2"] == "imagesTr/{subject}_0010.nii.gz"


def test_build_of_a_folder(folder, tmp_path):
    index = build("nnunet", folder, tmp_path / "set")
    assert index.sequences == tuple(KEYS) and index.scheme.regions["tumor_core"] == (2, 3)
    volumes = index.subjects()["BRATS_000"].label_volume_ml
    assert volumes == pytest.approx({"whole_tumor": 0.108, "tumor_core": 0.072, "enhancing_tumor": 0.036})


def test_the_derived_spec_can_be_kept_as_a_yaml_file_and_edited(folder, tmp_path):
    spec = load_spec("nnunet", folder)
    (tmp_path / "derived.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    assert load_spec(tmp_path / "derived.yaml") == spec


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({}, ["channel_names"], "neither channel_names nor modality"),
        ({}, ["labels"], "labels: Field required"),
        ({"labels": {}}, [], "labels: Dictionary should have at least 1 item"),
        ({}, ["regions_class_order"], "labels are regions, but regions_class_order is missing"),
        ({"regions_class_order": [1, 2]}, [], "regions_class_order has 2 values for 3 regions"),
        ({"regions_class_order": [3, 2, 1]}, [], r"label_scheme: paint: a voxel of value 1 .* order the regions from the outermost"),
        ({"labels": {"background": 0, "tumor": 1, "ignore": 2}}, ["regions_class_order"], "'ignore' .* has no counterpart"),
        ({"labels": {"background": 0, "tumor": "one"}}, ["regions_class_order"], "labels: 'tumor' is neither a value nor a list"),
        ({"labels": {"0": "background", "1": "x", "2": "x"}}, ["regions_class_order"], "labels: two values have one name"),
        ({"labels": {"background": 0, "tumor": 700}}, ["regions_class_order"], r"700 is outside 0\.\.255"),
        ({"channel_names": {"zero": "T1"}}, [], "channel 'zero' is no number"),
        ({"file_ending": ".png"}, [], r"file_ending '\.png' cannot be read"),
        ({"numTraining": 4}, [], "numTraining is 4, but imagesTr holds 3 cases"),
        ({"training": V1["training"] + [{"image": "./imagesTr/X.nii.gz"}]}, [], r"lists case X, which imagesTr lacks \(1 in all\)"),
        ({"training": V1["training"][1:]}, [], r"does not list case BRATS_000 of imagesTr \(1 in all\)"),
        ({"training": ["./imagesTr/X.nii.gz"]}, [], r"training\.0: expected an object with image and label"),
        ({"dataset": {"a": {"images": ["x"], "label": "y"}}}, [], "`dataset` lists files one by one"),
    ],
)
def test_what_is_refused(folder, change, drop, message):
    described(folder, change, drop)
    with pytest.raises(UserError, match=r"dataset\.json: .*" + message) as error:
        load_spec("nnunet", folder)
    assert "\n" not in str(error.value)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(UserError, match=r"spec nnunet: is read from the folder's dataset\.json"):
        load_spec("nnunet")
    with pytest.raises(UserError, match="none: no such folder"):
        load_spec("nnunet", tmp_path / "none")
    with pytest.raises(UserError, match=r"no dataset\.json here"):
        load_spec("nnunet", tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "expected an object"), ("[" * 100_000, "not valid JSON")):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=rf"dataset\.json: {message}"):
            load_spec("nnunet", folder)
    assert "nnunet" not in known_specs()  # no file of that name


def test_a_missing_channel_or_label_is_named(folder):
    (folder / "imagesTr/BRATS_001_0003.nii.gz").unlink()
    with pytest.raises(UserError, match=r"subject BRATS_001: no T2; expected .*imagesTr/BRATS_001_0003\.nii\.gz"):
        load_spec("nnunet", folder).find_cases(folder)
    write_nifti(folder / "imagesTr/BRATS_001_0003.nii.gz", head(0))
    (folder / "labelsTr/BRATS_002.nii.gz").unlink()
    with pytest.raises(UserError, match=r"subject BRATS_002: no label; expected .*labelsTr/BRATS_002\.nii\.gz"):
        load_spec("nnunet", folder).find_cases(folder)
