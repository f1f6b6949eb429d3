"""The student for use elsewhere: weights with their facts, and `mstkd.load`."""

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from exported_runs import SUBJECT, TESTS, case_files, refuse_identifying
from safetensors.torch import load_file
from trained_run import make_run, method_and_source

import mstkd
from mstkd.errors import UserError
from mstkd.export import export
from mstkd.predict import predict_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def student(run):
    return export(run, run.parents[1] / "student")


@pytest.fixture(scope="module")
def predicted(run):
    """subset -> what `mstkd predict` writes of one subject that has it."""

    def predict(*sequences: str) -> nib.Nifti1Image:
        root = run.parents[1] / "+".join(sequences)
        if not root.exists():
            (root / "in" / SUBJECT).mkdir(parents=True)
            for file in case_files(run, *sequences).values():
                shutil.copy(file, root / "in" / SUBJECT)
            predict_folder(run, root / "in", root / "out")
        return nib.load(root / "out" / f"{SUBJECT}.nii.gz")

    return predict


def test_export_carries_what_is_needed_and_nothing_that_identifies(run, student, tmp_path):
    facts = json.loads((student / "mstkd.json").read_text())
    assert facts["sequences"] == ["flair", "t1", "t1ce", "t2"] and facts["method"]["name"] == "toys.linear"
    assert facts["label_scheme"]["paint"] == {"WT": 2, "TC": 1, "ET": 4} and facts["intensity"]["kind"] == "zscore"
    assert {path.stat().st_mode & 0o777 for path in student.iterdir()} == {(student / "mstkd.json").stat().st_mode & 0o777}
    refuse_identifying(student, run)
    assert "/" not in (student / "mstkd.json").read_text()
    method, _ = method_and_source(run.parents[1] / "shards")
    torch.nn.init.zeros_(method.networks["student"][0].weight)
    method.networks["student"].load_state_dict(load_file(student / "student.safetensors"))
    assert method.networks["student"][0].weight.sum().item() == pytest.approx(3.0)
    with pytest.raises(UserError, match="exists already; choose another --out"):
        export(run, student)
    with pytest.raises(UserError, match="export format 'pickle': choose safetensors, onnx, monai-bundle or mlflow"):
        export(run, tmp_path / "other", "pickle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opened", ["student", "run"])
@pytest.mark.parametrize("sequences", [("flair", "t1", "t1ce", "t2"), ("t2", "flair")])
def test_a_loaded_model_predicts_as_the_command_does(request, run, predicted, opened, sequences, tmp_path):
    model, expected = mstkd.load(request.getfixturevalue(opened)), predicted(*sequences)
    result = model.predict(case_files(run, *sequences))
    np.testing.assert_array_equal(result.labels, np.asanyarray(expected.dataobj))
    np.testing.assert_array_equal(result.affine, expected.affine)
    assert result.subset == "+".join(name for name in model.sequences if name in sequences) and result.labels.any()
    result.save(tmp_path / "labels.nii.gz")
    assert nib.load(tmp_path / "labels.nii.gz").header == expected.header


def test_a_folder_is_read_as_the_data_set_names_files(run, student, predicted):
    result = mstkd.load(student).predict(run.parents[1] / "nifti" / SUBJECT)
    np.testing.assert_array_equal(result.labels, np.asanyarray(predicted("flair", "t1", "t1ce", "t2").dataobj))


CLEAN = """
import sys

sys.modules |= dict.fromkeys(["deepspeed", "mlflow"])  # as if they were not installed
import mstkd

assert not {"torch", "numpy", "nibabel"} & sys.modules.keys(), "import mstkd is cheap"
folder, flair, t2, out = sys.argv[1:]
model = mstkd.load(folder)
result = model.predict({"flair": flair, "t2": t2})
result.save(out)
"""


@pytest.mark.parametrize("opened", ["student", "run"])
def test_it_takes_neither_deepspeed_nor_mlflow(request, run, predicted, opened, tmp_path):
    files, out = case_files(run, "flair", "t2"), tmp_path / "labels.nii"
    words = [sys.executable, "-c", CLEAN, request.getfixturevalue(opened), files["flair"], files["t2"], out]
    done = subprocess.run(words, env={"PATH": "", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.asanyarray(nib.load(out).dataobj), np.asanyarray(predicted("flair", "t2").dataobj))


def test_bad_input_is_one_line(run, student, tmp_path):
    def fails(match, call, *words):
        with pytest.raises(UserError, match=match) as caught:
            call(*words)
        assert "\n" not in str(caught.value)

    model, files = mstkd.load(student), case_files(run)
    fails("neither a folder written by mstkd export nor a run folder", mstkd.load, tmp_path)
    fails("no image given; this model knows flair, t1, t1ce, t2", model.predict, {})
    fails("sequence 'dwi': unknown; this model knows flair", model.predict, {"dwi": files["t1"]})
    fails("sequence 'brain_mask': unknown", model.predict, {"t1": files["t1"], "brain_mask": files["t1"]})
    fails("no such file", model.predict, {"t1": tmp_path / "nothing.nii.gz"})
    fails("holds 10 cases; give the folder of one", model.predict, run.parents[1] / "nifti")
    copy = shutil.copytree(student, tmp_path / "copy")
    (copy / "student.safetensors").write_bytes((copy / "student.safetensors").read_bytes()[:-40])
    fails("student.safetensors: does not fit toys.linear: .*; export the run again", mstkd.load, copy)
    (copy / "student.safetensors").unlink()
    fails("student.safetensors: no such file; copy the whole exported folder", mstkd.load, copy)
    (copy / "mstkd.json").write_text((copy / "mstkd.json").read_text().replace('"format": 1', '"format": 2'))
    fails("mstkd.json: format: .*written by another version than mstkd .*Export the run again", mstkd.load, copy)


def test_a_synthesis_and_a_set_without_a_spec_are_refused(run, tmp_path):
    own, synthesis = (shutil.copytree(run, tmp_path / name) for name in ("own", "synthesis"))
    (own / "record.json").write_text((own / "record.json").read_text().replace('"phantom"', '"mine"'))
    with pytest.raises(UserError, match="data set mine has no packaged spec; say how files are named with --spec FILE"):
        export(own, tmp_path / "out")
    recipe = yaml.safe_load((synthesis / "config.yaml").read_text())
    recipe["method"], recipe["data"] = {"name": "toys.copying"}, recipe["data"] | {"crop": None, "slices": {"size": 32}}
    (synthesis / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="toys.copying is for synthesis; this command takes runs of segmentation"):
        export(synthesis, tmp_path / "out")
    assert not (tmp_path / "out").exists()
