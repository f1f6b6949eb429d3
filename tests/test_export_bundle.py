"""A run written as ONNX and as a MONAI bundle: what others can do with it, without mstkd."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
import yaml
from exported_runs import SEQUENCES, SUBJECT, TESTS, case_files, refuse_identifying, unet_run
from trained_run import CROP, method_and_source

import mstkd
from mstkd.config import InferenceConfig, IntensityConfig
from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor
from mstkd.export import bundle_case, export
from mstkd.export.onnx import runner
from mstkd.shards.dataset import load_spec
from mstkd.shards.preprocess import preprocess


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return unet_run(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def bundle(run):
    return export(run, run.parents[1] / "unet_bundle", "monai-bundle")


def test_onnx_files_say_how_to_use_them(run, tmp_path, capsys):
    folder = export(run, tmp_path / "student", "onnx")
    assert "student.onnx: differs from torch by " in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"student.onnx", "labels.onnx", "mstkd.json"}
    for name in ("student.onnx", "labels.onnx"):
        facts = {entry.key: entry.value for entry in onnx.load(folder / name).metadata_props}
        assert facts["sequences"] == "flair,t1,t1ce,t2" and facts["window"] == "24,24,24"
        assert json.loads(facts["labels"])["paint"]["ET"] == 4 and json.loads(facts["intensity"])["kind"] == "zscore"
        assert json.loads(facts["mstkd"]) == json.loads((folder / "mstkd.json").read_text())
    logits = runner(folder / "student.onnx")(torch.zeros(3, 4, *CROP), torch.ones(3, 4, dtype=torch.bool))
    labels = runner(folder / "labels.onnx")(logits)
    assert logits.shape == (3, 4, *CROP) and labels.shape == (3, *CROP) and labels.dtype == torch.uint8
    refuse_identifying(folder, run)


WITHOUT_MSTKD = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mstkd":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
bundle, schema, cases, labels = sys.argv[1:]
files = ["--meta_file", f"{bundle}/configs/metadata.json"]
network = [*files, "--config_file", f"{bundle}/configs/inference.json", "--bundle_root", bundle]
for words in (
    ["verify_metadata", *files, "--filepath", schema],
    ["verify_net_in_out", "network_def", *network],
    ["run", *network, "--dataset_dir", cases, "--output_dir", labels],
):
    sys.argv = ["monai.bundle", *words]
    runpy.run_module("monai.bundle", run_name="__main__")
assert "mstkd" not in sys.modules
"""


def test_monai_accepts_the_bundle_and_predicts_with_it_as_mstkd_does(run, bundle, tmp_path):
    """Cases with all sequences, with two and with one; nothing of mstkd can be imported."""
    given = {"whole": SEQUENCES, "two": ("t1ce", "t2"), "one": ("t1",)}
    for name, sequences in given.items():
        (tmp_path / "cases" / name).mkdir(parents=True)
        for sequence, file in case_files(run, *sequences).items():
            shutil.copy(file, tmp_path / "cases" / name / f"{sequence}.nii.gz")
    words = [sys.executable, "-c", WITHOUT_MSTKD, bundle, TESTS / "monai_bundle_schema.json", tmp_path / "cases", tmp_path / "labels"]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, env=environment, cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "metadata is verified with no error" in done.stdout + done.stderr
    assert "data shape of network is verified with no error" in done.stdout + done.stderr
    model = mstkd.load(run)
    for name, sequences in given.items():
        written, expected = nib.load(tmp_path / "labels" / f"{name}.nii.gz"), model.predict(case_files(run, *sequences))
        np.testing.assert_array_equal(written.affine, expected.affine)
        differing = int((np.asanyarray(written.dataobj) != expected.labels).sum())
        print(f"{name}: {differing} of {expected.labels.size} voxels differ")
        assert differing <= 1e-4 * expected.labels.size and len(np.unique(expected.labels)) > 2


def test_the_bundle_is_complete_and_tells_nobody(run, bundle):
    names = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert names == {
        "LICENSE", "docs/README.md", "configs/metadata.json", "configs/inference.json", "configs/mstkd.json", "models/model.ts", "models/model.pt",
        "scripts/__init__.py", "scripts/case.py",
    }  # fmt: skip
    refuse_identifying(bundle, run)
    network = torch.jit.load(bundle / "models/model.ts")
    weights = torch.load(bundle / "models/model.pt", weights_only=True)
    assert {name: value.shape for name, value in network.state_dict().items()} == {name: value.shape for name, value in weights.items()}
    image = torch.randn(1, 4, *CROP)
    assert torch.equal(network(image), network(image, torch.ones(1, 4, dtype=torch.bool)))
    assert "{" not in (bundle / "docs/README.md").read_text() and "`flair.nii.gz`" in (bundle / "docs/README.md").read_text()


@pytest.mark.parametrize(
    "intensity",
    [
        IntensityConfig(), IntensityConfig(kind="percentile", percentile="0.1"),
        *(IntensityConfig(kind=kind, interval=(-1, 1)) for kind in ("minmax", "reference_minmax", "percentile")),
    ],
    ids=lambda intensity: f"{intensity.kind}-{intensity.percentile}",
)
def test_the_bundles_script_normalises_as_predict_does(run, intensity, monkeypatch):
    method, _ = method_and_source(run.parents[1] / "shards")
    monkeypatch.setattr(type(method), "intensity", intensity)
    spec = load_spec("phantom")
    (case,) = spec.find_cases(run.parents[1] / "nifti" / SUBJECT, require_complete=False)
    stored = preprocess(replace(case, label=None), spec)
    window = tuple(size + 5 for size in stored.brain.shape)  # so that there is a margin
    expected = Predictor(method, SEQUENCES, window, InferenceConfig(), torch.device("cpu")).volume(stored.image, stored.brain, stored.meta)
    facts = {
        "sequences": SEQUENCES, "subsets": None, "crop": window, "intensity": intensity.model_dump(mode="json"), "hidden_value": intensity.hidden_value,
        "inference": InferenceConfig().model_dump(mode="json"), "files": {"preprocessing": {"margin_voxels": 0}},
    }  # fmt: skip
    seen = []

    class Network:
        def __call__(self, image, available):
            seen.append(image.clone())  # MONAI weighs what it gets in place
            return image

        def labels(self, logits):
            return torch.zeros(1, *logits.shape[2:], dtype=torch.uint8)

    bundle_case.predict_case(Network(), facts, {name: nib.load(volume.path) for name, volume in case.files.items()})
    assert torch.allclose(seen[0], expected.image, atol=1e-5)


def test_an_image_of_one_value_but_for_rare_voxels_is_the_minimum(run):
    """As for `predict`, where a percentile range of no width is not divided by."""
    raw = np.full((20, 20, 20), 7, np.float32)
    raw[3, 3, 3] = 9
    facts = {"kind": "percentile", "percentile": "0.5", "interval": [-1, 1]}
    found = bundle_case._normalised(raw, np.ones(raw.shape, bool), [(0, 0)] * 3, facts)
    assert (found == -1).all()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (("inference", "postprocess"), "cc+et", r"label maps are cleared up by cc\+et, which the bundle's own script cannot do; use safetensors"),
        (("method", "intensity"), {"kind": "clahe"}, "images are equalised"),
    ],
)
def test_what_the_script_cannot_prepare_is_refused(run, tmp_path, key, value, match):
    copy = shutil.copytree(run, tmp_path / "copy")
    recipe = yaml.safe_load((copy / "config.yaml").read_text())
    recipe[key[0]][key[1]] = value
    (copy / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=match) as caught:
        export(copy, tmp_path / "out", "monai-bundle")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
