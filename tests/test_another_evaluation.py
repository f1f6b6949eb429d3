"""One training evaluated several ways: what may change, where it lies, and that a comparison takes it as an arm of its own."""

import csv
import json
import shutil

import pytest
import yaml
from small_synthesis import SINGLE, read, write
from trained_run import make_run, write_run

from mstkd.compare.run import compare
from mstkd.compare.runs import evaluated_since, read_evaluated_run
from mstkd.errors import UserError
from mstkd.evaluate.run import evaluate_run
from mstkd.trained_run import open_run

NOISY = "shards-test-method.noise=0.2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A segmentation, and a synthesis run that copies the one sequence it is given."""
    folder = tmp_path_factory.mktemp("again")
    make_run(folder)
    write(folder, "copying", SINGLE, evaluate={"networks": ["student"]})
    return folder / "runs"


@pytest.fixture(scope="module")
def twice(root):
    """The synthesis run's folder, evaluated by its recipe and with noise."""
    evaluate_run(root / "copying")
    evaluate_run(root / "copying", overrides=["method.noise=0.2"])
    return root / "copying"


def test_it_lies_beside_the_runs_own_with_the_recipe_that_it_was_made_by(twice):
    own, noisy = (read(twice / "evaluation" / name / "summary.json") for name in ("", NOISY))
    assert noisy["mean"]["psnr"] < own["mean"]["psnr"] - 1 and noisy["mean"]["z_gradient"] > own["mean"]["z_gradient"] + 0.02
    assert yaml.safe_load((twice / "evaluation" / NOISY / "config.yaml").read_text())["method"]["noise"] == 0.2
    assert not (twice / "evaluation" / "config.yaml").exists() and open_run(twice, tasks=("synthesis",)).config.method.get("noise", 0.0) == 0.0


def test_a_comparison_takes_it_as_an_arm_with_the_costs_of_the_one_training(twice, tmp_path):
    found = compare([twice, twice / "evaluation" / NOISY], tmp_path / "out")
    assert list(found.arms) == ["toys.copying", "toys.copying noise=0.2", "copy"] and found.baseline == "toys.copying"
    assert found.mean("toys.copying noise=0.2", "psnr").score.value == pytest.approx(read(twice / "evaluation" / NOISY / "summary.json")["mean"]["psnr"])
    costs = [found.arms[label].costs for label in list(found.arms)[:2]]
    assert costs[0].scored_parameters == costs[1].scored_parameters == 2 and costs[0].seconds_per_case != costs[1].seconds_per_case
    assert {"z_gradient", "spectrum_db"} <= {measure.key for measure in found.measures}
    assert compare([twice / "evaluation" / NOISY, twice]).out.parent == twice.parent


def test_evaluations_from_before_a_measure_are_compared_without_it(twice, tmp_path):
    shutil.copytree(twice, tmp_path / "runs" / "old")
    for rows in (tmp_path / "runs" / "old" / "evaluation").glob("*per_case.csv"):
        lines = list(csv.DictReader(rows.open()))
        with rows.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [key for key in lines[0] if key not in ("z_gradient", "spectrum_db")], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)
    summary = tmp_path / "runs" / "old" / "evaluation" / "summary.json"
    content = json.loads(summary.read_text())
    for cell in (*content["patterns"].values(), content["mean"]):
        del cell["z_gradient"], cell["spectrum_db"]
    for key in ("z_gradient", "spectrum_db"):
        del content["conventions"][key]
    summary.write_text(json.dumps(content))
    found = compare([tmp_path / "runs" / "old", twice / "evaluation" / NOISY], tmp_path / "out")
    assert [measure.key for measure in found.measures] == ["psnr", "ssim", "local_psnr", "local_ssim"]
    assert found.conventions["z_gradient"] == "not compared: only some of the runs measured it"


def test_both_ways_of_segmenting_stand_in_one_table(root, tmp_path):
    toy = root / "toy"
    evaluate_run(toy)
    evaluate_run(toy, complete=root / "copying")
    evaluate_run(write_run(root.parent, "other", {"name": "toys.two_stage"}))
    found = compare([toy, toy / "evaluation" / "shards-test-copying"], tmp_path / "out")
    assert list(found.arms) == ["toys.linear", "toys.linear complete=copying"]
    assert found.patterns[:4] == ("flair", "t1", "t1ce", "t2") and "flair+t1+t1ce+t2" in found.patterns
    assert any(note.startswith("completed: every subset was completed by toys.copying") for note in found.arms["toys.linear complete=copying"].notes)
    alone = compare([root / "other", toy / "evaluation" / "shards-test-copying"], tmp_path / "alone")
    assert list(alone.arms) == ["toys.two_stage", "toys.linear complete=copying"]  # though no arm of its method is without
    shown = read_evaluated_run(toy / "evaluation" / "shards-test-copying")
    assert shown.config.evaluate.complete == str(root / "copying") and shown.trained == toy


def test_what_was_trained_cannot_be_changed(root):
    run = root / "copying"
    for override, message in (
        ("data.slices.size=64", "data.slices.size=64: copying was trained with 32; only inference.*, evaluate.*, method.noise.* can be changed afterwards"),
        ("method.nois=3", "unknown key method.nois; did you mean 'noise'?"),
        ("train.steps=9", "train.steps=9: copying was trained with 1"),
        ("inference.bach=3", "override 'inference.bach=3': unknown key inference.bach; did you mean 'batch'?"),
    ):
        with pytest.raises(UserError) as caught:
            evaluate_run(run, overrides=[override])
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((run / "evaluation").glob("*slices*"))


def test_one_of_older_weights_or_of_another_split_is_refused(twice, tmp_path):
    shutil.copytree(twice, tmp_path / "run")
    again = tmp_path / "run" / "evaluation" / NOISY
    assert evaluated_since(again) and evaluated_since(tmp_path / "run")
    (again / "weights.json").write_text(json.dumps({"copy": "step-00000009"}))
    assert not evaluated_since(again) and evaluated_since(tmp_path / "run")
    with pytest.raises(UserError, match="was trained on after its evaluation"):
        read_evaluated_run(again)
    (again / "weights.json").unlink()
    (again / "summary.json").write_text(json.dumps(read(again / "summary.json") | {"split": "val"}))
    with pytest.raises(UserError, match="is of the split val; compare evaluations of test splits"):
        read_evaluated_run(again)
