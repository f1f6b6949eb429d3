"""The whole way on a real patient: build, verify, train, evaluate, predict; real headers and intensities, no enhancing tumour."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from short_runs import TINY

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_case"
SPEC = """
name: real
description: one patient, four sequences in one folder
licence: CC BY 3.0
layout: flat
sequences: {flair: "{subject}_flair.nii.gz", t1: "{subject}_t1.nii.gz", t1ce: "{subject}_t1ce.nii.gz", t2: "{subject}_t2.nii.gz"}
label: "{subject}_seg.nii.gz"
labels: required
label_scheme: brats2018
"""


def mstkd(*words, cwd):
    command = [str(Path(sys.executable).parent / "mstkd"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real patient in {REAL}")
def test_a_real_patient_from_files_to_label_maps(tmp_path):
    subject = next(REAL.glob("*_flair.nii.gz")).name.removesuffix("_flair.nii.gz")
    (tmp_path / "real.yaml").write_text(SPEC)
    (tmp_path / "splits.json").write_text(json.dumps({"version": 1, "folds": [{"train": [subject], "val": [subject]}], "test": [subject]}))
    mstkd("shards", "build", "--spec", "real.yaml", "--src", REAL, "--out", "shards", "--splits", "splits.json", "--allow-overlap", cwd=tmp_path)
    mstkd("shards", "verify", "shards", cwd=tmp_path)
    mstkd("train", "mst_kdnet_phantom", "name=real", "data.shards=shards", "data.crop=[96, 96, 96]", "data.allow_overlap=true", "train.steps=5", "train.global_batch=1",
          "validate.subsets=[flair]", "inference.overlap=0", "evaluate.networks=[student]", TINY[0], cwd=tmp_path)  # fmt: skip
    run = tmp_path / "runs/real"
    mstkd("evaluate", run, cwd=tmp_path)
    summary = json.loads((run / "evaluation/summary.json").read_text())
    assert len(summary["subsets"]) == 15
    for regions in summary["subsets"].values():  # no enhancing tumour: by the convention 1 and 0, or 0 and the diagonal
        enhancing = regions["ET"]
        assert enhancing["n_nonempty"] == 0 and enhancing["dice_nonempty"] is None and enhancing["hd95_nonempty_mm"] is None
        found = enhancing["false_positive_cases"]
        assert enhancing["dice"] == 1 - found
        assert enhancing["hd95_mm"] == pytest.approx(found * 373.13, abs=0.01)
    assert "ALLOWED OVERLAP" in summary["conventions"]["overlap"]

    source = nib.load(REAL / f"{subject}_flair.nii.gz")
    for given in ("flair+t1+t1ce+t2", "flair+t1ce", "flair"):
        folder, out = tmp_path / given, tmp_path / f"predicted-{given}"
        folder.mkdir()
        for sequence in given.split("+"):
            (folder / f"{subject}_{sequence}.nii.gz").symlink_to(REAL / f"{subject}_{sequence}.nii.gz")
        assert given in mstkd("predict", run, "--input", folder, "--output", out, "--spec", "real.yaml", cwd=tmp_path)
        label = nib.load(out / f"{subject}.nii.gz")
        assert label.shape == source.shape and label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(label.affine, source.affine)
        for form in ("qform", "sform"):
            assert label.header[f"{form}_code"] == source.header[f"{form}_code"]
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2, 4}
        scored = tmp_path / f"scored-{given}"
        mstkd("evaluate", "--pred", out, "--ref", REAL, "--spec", "real.yaml", "--out", scored, cwd=tmp_path)
        if given == "flair+t1+t1ce+t2":  # fewer sequences give another brain mask, hence another brain box
            again = json.loads((scored / "summary.json").read_text())
            assert again["subsets"][given] == summary["subsets"][given]
