"""A segmentation behind a synthesis run: what it is shown, what the evaluation says, `mstkd predict --complete`, and what is refused."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml
from trained_run import make_run, write_run

from mstkd.errors import UserError
from mstkd.evaluate.completed_inputs import CompletingPredictor, front_takes
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.metrics import dice, region_masks
from mstkd.evaluate.run import evaluate_run
from mstkd.predict import predict_folder
from mstkd.trained_run import open_run

SINGLES = ["flair", "t1", "t1ce", "t2"]
WHOLE = "flair+t1+t1ce+t2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds a segmentation, and a synthesis run that copies the one sequence that it is given."""
    folder = tmp_path_factory.mktemp("front")
    make_run(folder)
    write_run(folder, "copying", {"name": "toys.copying", "given": SINGLES}, None, {"size": 32})
    return folder


@pytest.fixture(scope="module")
def evaluated(root):
    """The folders of both ways: zero-filled, and completed."""
    evaluate_run(root / "runs" / "toy")
    evaluate_run(root / "runs" / "toy", complete=root / "runs" / "copying")
    return root / "runs" / "toy" / "evaluation", root / "runs" / "toy" / "evaluation" / "shards-test-copying"


def read(folder):
    return json.loads((folder / "summary.json").read_text())


def predictor(root):
    return CompletingPredictor(open_run(root / "runs" / "toy"), open_run(root / "runs" / "copying", tasks=("synthesis",)))


def test_what_the_front_takes_is_scored_and_the_whole(root, evaluated):
    plain, completed = (read(folder) for folder in evaluated)
    assert list(completed["subsets"]) == [*SINGLES, WHOLE] == list(front_takes(open_run(root / "runs" / "copying", tasks=("synthesis",))))
    assert completed["subsets"][WHOLE] == plain["subsets"][WHOLE]  # nothing to complete
    assert any(completed["subsets"][name] != plain["subsets"][name] for name in SINGLES)
    assert "toys.copying (copying)" in completed["conventions"]["completed"] and "never trained" not in completed["conventions"]
    cost = json.loads((evaluated[1] / "cost.json").read_text())["student"]
    assert 0 < cost["completion_seconds_per_case"] < cost["seconds_per_case"]


def test_the_figures_are_those_of_the_completed_case(root, evaluated):
    front = predictor(root)
    source = open_run(root / "runs" / "toy").source
    subjects, found = source.subjects("test"), []
    with evaluation_mode(*front.methods):
        for subject in subjects:
            sample = source.subject(subject)
            made = front.completer.sample("student", sample, (False, True, False, False))
            assert made.meta.synthetic == ("flair", "t1ce", "t2") and np.array_equal(made.image[1], sample.image[1])
            labels = front.labels("student", front.volume(made.image, made.brain, made.meta), (True,) * 4)
            found.append(dice(region_masks(labels, front.scheme)["WT"], region_masks(sample.label, source.label_scheme)["WT"]))
    assert read(evaluated[1])["subsets"]["t1"]["WT"]["dice"] == pytest.approx(np.mean(found), abs=1e-9)


def test_the_recipe_can_say_so_too(root, evaluated):
    shutil.copytree(root / "runs" / "toy", root / "runs" / "both", ignore=shutil.ignore_patterns("evaluation"))
    recipe = yaml.safe_load((root / "runs" / "both" / "config.yaml").read_text())
    recipe["name"], recipe["evaluate"]["complete"] = "both", str(root / "runs" / "copying")
    (root / "runs" / "both" / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert evaluate_run(root / "runs" / "both")["subsets"] == read(evaluated[1])["subsets"]
    assert (root / "runs" / "both" / "evaluation" / "summary.json").is_file()


def test_predict_completes_first(root, tmp_path):
    key = "Phantom_0000"
    folder = next((root / "nifti").rglob(f"{key}_flair.nii.gz")).parent
    (tmp_path / "in" / key).mkdir(parents=True)
    shutil.copy(folder / f"{key}_t2.nii.gz", tmp_path / "in" / key)
    paths = [predict_folder(root / "runs" / "toy", tmp_path / "in", tmp_path / name, complete=front) for name, front in
             (("plain", None), ("completed", root / "runs" / "copying"))]  # fmt: skip
    plain, completed = (np.asarray(nib.load(path[0]).dataobj) for path in paths)
    assert plain.shape == completed.shape and (plain != completed).any()
    assert json.loads((tmp_path / "completed" / "predictions.json").read_text())["cases"][key]["subset"] == "t2"


def test_what_does_not_fit_is_refused(root, tmp_path):
    toy, copying = root / "runs" / "toy", root / "runs" / "copying"
    with pytest.raises(UserError, match="evaluate.complete: .*toys.linear is for segmentation; this command takes runs of synthesis"):
        evaluate_run(toy, complete=toy)
    with pytest.raises(UserError, match="evaluate.complete: is for segmentations, and toys.copying is for synthesis"):
        evaluate_run(copying, complete=copying)
    with pytest.raises(UserError, match="evaluate.complete: .*is not a run folder"):
        evaluate_run(toy, complete=tmp_path)
    other = shutil.copytree(copying, root / "runs" / "reversed")
    record = json.loads((other / "record.json").read_text())
    record["data"]["sequences"].reverse()
    (other / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="reversed: completes t2, t1ce, t1, flair; toy was trained on flair, t1, t1ce, t2, in that order"):
        evaluate_run(toy, complete=other)
    with pytest.raises(UserError, match="training subject"):
        evaluate_run(toy, split="train", complete=copying)
