"""A whole run evaluated on real shard sets: figures, files, ranks, overlap, pictures."""

import csv
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from toys.linear import Linear
from trained_run import CROP, make_run, method_and_source, predictor_and_source, write_run

from mstkd.config import ValidateConfig
from mstkd.data.training import open_stores
from mstkd.engine.environment import Ranks
from mstkd.engine.teacher import load_weights
from mstkd.errors import UserError
from mstkd.evaluate import figures
from mstkd.evaluate.cases import Row, score_subjects, whole_brain_baseline
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.overlap import find_overlap
from mstkd.evaluate.report import best_median_worst
from mstkd.evaluate.label_files import evaluate_predictions
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.scoring import Score
from mstkd.evaluate.summary import summarise
from mstkd.evaluate.validation import Validation
from mstkd.evaluate.weights import best_files, load_networks, safetensors_of
from mstkd.run_folder import read_run_config
from mstkd.shards.build import build as build_shards
from mstkd.shards.dataset import SPEC_FOLDER
from mstkd.shards.spec import read_index, read_splits
from mstkd.subsets import all_subsets, subset_name
from mstkd.trained_run import open_run

REAL_CASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_case"
SEQUENCES = ("flair", "t1", "t1ce", "t2")
CELL = {"dice", "dice_nonempty", "n", "n_nonempty", "false_positive_cases", "hd95_mm", "hd95_nonempty_mm", "hd95_n", "missed"}
CELL |= {"sensitivity", "specificity", "truth_ml", "predicted_ml", "volume_error_ml", "absolute_volume_error_ml", "lesion_dice", "lesion_hd95_mm"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def evaluated(run):
    evaluate_run(run)
    return run / "evaluation"


@pytest.fixture(scope="module")
def shards(run):
    return run.parents[1] / "shards"


def read(path):
    return json.loads(path.read_text())


def read_rows(folder):
    return list(csv.DictReader((folder / "per_case.csv").open()))


def test_summary_has_the_documented_shape(evaluated):
    for name in ("summary.json", "summary_teacher.json"):
        summary = read(evaluated / name)
        assert list(summary) == ["method", "split", "fold", "subsets", "mean", "conventions"]
        assert (summary["method"], summary["split"], summary["fold"]) == ("toys.linear", "test", 0)
        assert list(summary["subsets"])[:6] == ["flair", "t1", "t1ce", "t2", "flair+t1", "flair+t1ce"] and len(summary["subsets"]) == 15
        for cells in (*summary["subsets"].values(), summary["mean"]):
            assert list(cells) == ["WT", "TC", "ET"] and all(set(cell) == CELL for cell in cells.values())
    assert read(evaluated / "summary.json")["subsets"] != read(evaluated / "summary_teacher.json")["subsets"]


def test_summary_is_the_mean_of_the_cases(evaluated):
    rows, summary = read_rows(evaluated), read(evaluated / "summary.json")
    for subset, cells in summary["subsets"].items():
        for region, cell in cells.items():
            mine = [r for r in rows if (r["network"], r["subset"], r["region"]) == ("student", subset, region)]
            dices = np.array([float(r["dice"]) for r in mine])
            truth, found = (np.array([int(r[k]) > 0 for r in mine]) for k in ("truth_voxels", "predicted_voxels"))
            assert cell["n"] == len(mine) == 2 and cell["dice"] == pytest.approx(dices.mean())
            assert cell["n_nonempty"] == truth.sum() and cell["missed"] == (truth & ~found).sum()
            assert cell["false_positive_cases"] == (~truth & found).sum() and cell["hd95_n"] == (truth & found).sum()
            assert cell["hd95_mm"] == pytest.approx(np.mean([float(r["hd95_mm"]) for r in mine]))
            for key in ("specificity", "truth_ml", "predicted_ml", "lesion_dice", "lesion_hd95_mm"):
                assert cell[key] == pytest.approx(np.mean([float(r[key]) for r in mine]))
            found = [float(r["sensitivity"]) for r in mine if r["sensitivity"]]
            assert len(found) == truth.sum() and cell["sensitivity"] == (pytest.approx(np.mean(found)) if found else None)
            errors = np.array([float(r["predicted_ml"]) - float(r["truth_ml"]) for r in mine])
            assert (cell["volume_error_ml"], cell["absolute_volume_error_ml"]) == pytest.approx((errors.mean(), abs(errors).mean()))
    for region in ("WT", "TC", "ET"):
        assert summary["mean"][region]["dice"] == pytest.approx(np.mean([c[region]["dice"] for c in summary["subsets"].values()]))
        assert summary["mean"][region]["n"] == 30


def test_means_over_no_case_are_null_and_kinds_are_told_apart():
    def row(subset, *score):
        return Row("student", "a", subset, "ET", Score(*score))

    rows = [row("t1", 1.0, 0, 0, 0.0), row("t1", 0.0, 0, 5, 100.0), row("flair", 0.0, 9, 0, 100.0), row("flair", 0.5, 9, 9, 4.0)]
    summary = summarise(rows, ("flair", "t1"), "m", "test", 0, {})
    assert list(summary["subsets"]) == ["flair", "t1"]
    assert summary["subsets"]["t1"]["ET"] == {
        "dice": 0.5, "dice_nonempty": None, "n": 2, "n_nonempty": 0, "false_positive_cases": 1, "hd95_mm": 50.0,
        "hd95_nonempty_mm": None, "hd95_n": 0, "missed": 0,
    }  # fmt: skip
    assert summary["subsets"]["flair"]["ET"] == {
        "dice": 0.25, "dice_nonempty": 0.25, "n": 2, "n_nonempty": 2, "false_positive_cases": 0, "hd95_mm": 52.0,
        "hd95_nonempty_mm": 4.0, "hd95_n": 1, "missed": 1,
    }  # fmt: skip
    assert summary["mean"]["ET"]["dice"] == 0.375 and summary["mean"]["ET"]["dice_nonempty"] == 0.25 and summary["mean"]["ET"]["n"] == 4


def test_result_does_not_depend_on_the_rank_count(run, shards, one_rank, two_ranks):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["validate"]["subsets"] = ["flair", "t1+t1ce"]
    (alone,), shared = (pool.run("trained_run.py", "on_ranks", shards=str(shards), config=config) for pool in (one_rank, two_ranks))
    assert shared[0] == shared[1] == alone
    assert len(alone[0]) == 5 * 2 * 4 * 3 and {row[1] for row in alone[0]} == set(list(read_index(shards).subjects())[:5])
    figures = alone[1]
    assert set(figures) == {"score", "dice_WT", "dice_TC", "dice_ET", "dice_flair", "dice_t1+t1ce"}
    assert figures["score"] == pytest.approx(np.mean([figures["dice_WT"], figures["dice_TC"], figures["dice_ET"]]))
    assert figures["score"] == pytest.approx((figures["dice_flair"] + figures["dice_t1+t1ce"]) / 2)


def test_hidden_voxels_cannot_matter(shards):
    predictor, source = predictor_and_source(shards)
    sample = source.subject(source.subjects("all")[0])
    volume = predictor.volume(sample.image, sample.brain, sample.meta)
    with evaluation_mode(predictor.method):
        before = predictor.labels("student", volume, (True, False, True, False))
        volume.image[0, [1, 3]] = torch.tensor([float("nan"), 1e9])[:, None, None, None]
        np.testing.assert_array_equal(predictor.labels("student", volume, (True, False, True, False)), before)
        assert not np.array_equal(predictor.labels("student", volume, (True, False, True, True)), before)


def test_a_volume_smaller_than_the_window_is_padded_with_background(shards):
    predictor, source = predictor_and_source(shards, window=(48, 40, 48))
    sample = source.subject(source.subjects("all")[0])
    assert all(size < need for size, need in zip(sample.brain.shape, predictor.window))
    volume = predictor.volume(sample.image, sample.brain, sample.meta)
    assert volume.image.shape[2:] == (48, 40, 48)
    with evaluation_mode(predictor.method):
        labels = predictor.labels("student", volume, (True,) * 4)
        plain = predictor.method.predict(torch.from_numpy(sample.image.astype(np.float32))[None], torch.ones(1, 4, dtype=torch.bool))
        np.testing.assert_array_equal(labels, predictor.method.to_labels(plain)[0])
    assert labels.any()


def test_evaluation_leaves_no_trace_in_the_networks(shards):
    predictor, source = predictor_and_source(shards, {"name": "toys.co_trained"})
    method = predictor.method
    method.networks["teacher"].eval()
    before = {k: v.clone() for net in method.networks.values() for k, v in net.state_dict().items()}
    arguments = (predictor, ["student"], source, source.subjects("test"), all_subsets(source.sequences)[:3], source.label_scheme)
    assert score_subjects(*arguments) == score_subjects(*arguments)
    after = {k: v for net in method.networks.values() for k, v in net.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert method.networks["student"].training and not method.networks["teacher"].training


def test_what_a_prediction_takes_is_noted(evaluated, shards):
    cases = len(read_splits(shards).test)
    for network in ("student", "teacher"):
        cost = read(evaluated / "cost.json")[network]
        assert cost["predictions"] == 15 * cases and cost["seconds_per_case"] > 0 and cost["device"] in ("cpu", "cuda")


def test_baseline_is_the_dice_of_the_whole_brain(evaluated, shards):
    _, source = method_and_source(shards)
    subjects = source.subjects("test")
    by_hand = []
    for sample in map(source.subject, subjects):
        tumour, brain = np.count_nonzero(sample.label), np.count_nonzero(sample.brain)
        by_hand += [2 * tumour / (tumour + brain)] if tumour else []  # the tumour lies in the brain
    assert read(evaluated / "baseline.json")["whole_brain"]["WT"] == whole_brain_baseline(source, subjects)
    assert whole_brain_baseline(source, subjects) == pytest.approx({"dice_nonempty": np.mean(by_hand), "n_nonempty": len(by_hand)})


def test_report_is_whole_and_needs_nothing_else(evaluated):
    html = (evaluated / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert html.count("<td>flair+t1ce</td>") == 4 and html.count("hd95_empty") == 5  # two networks; under each of five tables
    assert html.count("2 cases per line; truth non-empty in WT ") == 5
    student = read(evaluated / "summary.json")
    assert f"<td>{100 * student['mean']['WT']['dice_nonempty']:.1f}</td>" in html
    for picture in ("heat_map_student", "heat_map_teacher", "cases", "qualitative"):
        pixels = matplotlib.image.imread(evaluated / f"{picture}.png")
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05


def test_patients_right_is_on_the_left_of_the_picture():
    volume = np.zeros((6, 5, 4))
    volume[5, 4, 3] = 1  # right, anterior, superior
    axial, coronal, sagittal = (figures.oriented(volume, axis, index) for axis, index in ((2, 3), (1, 4), (0, 5)))
    assert axial.shape == (5, 6) and coronal.shape == (4, 6) and sagittal.shape == (4, 5)
    for picture in (axial, coronal, sagittal):  # last row is the top: drawn with origin lower
        assert picture[-1, 0] == 1


def test_best_median_worst():
    rows = [Row("student", name, "t1", "WT", Score(value, 1, 1)) for name, value in zip("abcde", (0.2, 0.9, 0.5, 0.1, 0.7))]
    assert best_median_worst(rows) == {"best": "b", "median": "c", "worst": "d"}
    assert best_median_worst(rows[:2]) == {"best": "b", "worst": "a"} and best_median_worst(rows[:1]) == {"best": "a"}


def test_other_splits_and_sets_get_their_own_folder(run, shards, tmp_path, capsys):
    evaluate_run(run, split="val")
    assert read(run / "evaluation" / "shards-val" / "summary.json")["split"] == "val"
    other = tmp_path / "hospital"
    shutil.copytree(shards, other)
    with pytest.raises(UserError, match="training subject .* and all subject .*: same patient .*say --allow-overlap"):
        evaluate_run(run, data=other, split="all")
    assert not (run / "evaluation" / "hospital-all").exists()
    capsys.readouterr()
    summary = evaluate_run(run, data=other, split="all", allow_overlap=True)
    assert "ALLOWED OVERLAP: 8 of these cases" in summary["conventions"]["overlap"] and "ALLOWED OVERLAP: 8" in capsys.readouterr().out
    assert "ALLOWED OVERLAP: 8" in (run / "evaluation" / "hospital-all" / "report.html").read_text()
    assert summary["subsets"]["flair"]["WT"]["n"] == 10


def test_options_reach_the_figures_and_are_named(evaluated, shards, tmp_path):
    (tmp_path / "shards").symlink_to(shards)
    other = write_run(tmp_path, "toy", {"name": "toys.linear"})
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["evaluate"] = {"networks": ["student"], "empty": "reference", "hd95": "pooled", "assd": True, "lesion_wise": False}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    summary = evaluate_run(other)
    assert not (other / "evaluation" / "summary_teacher.json").exists()
    assert all(set(cell) == CELL - {"lesion_dice", "lesion_hd95_mm"} | {"assd_mm", "assd_nonempty_mm"} for cell in summary["mean"].values())
    notes = summary["conventions"]
    assert "rewards missed" in notes["hd95_empty"] and "pooled" in notes["hd95_mm"] and "lesion_wise" not in notes
    assert "18-connected" in read(evaluated / "summary.json")["conventions"]["lesion_wise"]
    usual = read(evaluated / "summary.json")["subsets"]
    missed = [(s, r) for s, cells in usual.items() for r, cell in cells.items() if cell["missed"]]
    assert missed and all(summary["subsets"][s][r]["hd95_mm"] < usual[s][r]["hd95_mm"] for s, r in missed)


def test_each_case_once_on_what_it_has(evaluated, shards, tmp_path):
    (tmp_path / "shards").symlink_to(shards)
    run = write_run(tmp_path, "toy", {"name": "toys.linear"})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] = {"given": "present"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary, usual = evaluate_run(run), read(evaluated / "summary.json")
    assert list(summary["subsets"]) == ["present"] and summary["subsets"]["present"] == usual["subsets"]["flair+t1+t1ce+t2"]
    assert "never trained" not in summary["conventions"]


def test_overlap_is_found_by_content_under_another_name(shards, tmp_path):
    nifti = shards.parent / "nifti"
    for number in range(3):
        old, new = f"Phantom_{number:04d}", f"Other_{number:04d}"
        for file in sorted((nifti / old).iterdir()):
            scan = nib.load(file)
            data = np.asanyarray(scan.dataobj)
            if number == 1 and "seg" not in file.name:
                data = np.where(data != 0, np.round(0.37 * data + 90), 0).astype(np.int16)  # affine map, int16 rounding
            elif "seg" not in file.name:
                data = data[::-1]  # another subject altogether
            target = tmp_path / "other" / new / file.name.replace(old, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, scan.affine), target)
    build_shards("phantom", tmp_path / "other", tmp_path / "set")
    ours, theirs = read_index(shards), read_index(tmp_path / "set")
    found = find_overlap(ours, list(ours.subjects()), theirs, list(theirs.subjects()))
    assert [(a, b) for a, b, _ in found] == [("Phantom_0001", "Other_0001")] and "same image" in found[0][2]
    splits = read_splits(shards)
    assert find_overlap(ours, splits.folds[0].train, ours, splits.test) == []


def test_a_case_without_a_sequence_is_scored_on_what_it_has(run, tmp_path):
    shutil.copytree(run.parents[1] / "nifti", tmp_path / "nifti")
    (tmp_path / "nifti" / "Phantom_0002" / "Phantom_0002_t1ce.nii.gz").unlink()
    spec = yaml.safe_load((SPEC_FOLDER / "phantom.yaml").read_text()) | {"name": "incomplete", "allow_missing": True}
    (tmp_path / "incomplete.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    build_shards(tmp_path / "incomplete.yaml", tmp_path / "nifti", tmp_path / "shards")
    summary = evaluate_run(write_run(tmp_path, "toy", {"name": "toys.linear"}), split="all", allow_overlap=True)
    counts = {name: cells["WT"]["n"] for name, cells in summary["subsets"].items()}
    assert len(counts) == 15 and all(n == (9 if "t1ce" in name else 10) for name, n in counts.items())


def test_subsets_that_training_never_showed_are_named(shards, tmp_path, caplog):
    (tmp_path / "shards").symlink_to(shards)
    run = write_run(tmp_path, "toy", {"name": "toys.linear"})
    assert "never trained" not in evaluate_run(run)["conventions"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["availability"] = {"kind": "fixed", "subsets": [*(subset_name(SEQUENCES, s) for s in all_subsets(SEQUENCES) if any(s[:2]))]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate_run(run)["conventions"]["never trained"].startswith("t1ce, t2, t1ce+t2: training never gave these")
    assert "toy was never trained on t1ce, t2, t1ce+t2" in caplog.text


def test_a_method_is_given_its_own_subsets_only(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Linear, "subsets", ("t1+t2", "flair"))
    (tmp_path / "shards").symlink_to(shards)
    assert list(evaluate_run(write_run(tmp_path, "toy", {"name": "toys.linear"}))["subsets"]) == ["flair", "t1+t2"]
    with pytest.raises(UserError, match=r"validate.subsets: the method cannot be given t1; choose from t1\+t2, flair, or remove the key"):
        validation(tmp_path, {"subsets": ["t1"]})
    assert len(validation(tmp_path, {}).subsets) == 2


def validation(root, section):
    config = read_run_config(root / "runs" / "toy")
    config.validation = ValidateConfig(**section)
    return Validation(config, open_stores(config.data), Ranks(0, 1, 0, torch.device("cpu")), Linear.subsets)


def test_every_error_is_one_clear_line(run, shards, tmp_path):
    def fails(match, *arguments, **named):
        with pytest.raises(UserError, match=match) as caught:
            evaluate_run(*arguments, **named)
        assert "\n" not in str(caught.value)

    fails("is not a run folder", tmp_path)
    fails("split 'tset': choose one of test, val", run, split="tset")
    fails("no such folder", run, data=tmp_path / "nowhere")
    fails("data.cache_dir: not set, and s3://bucket/set lies on a server", run, data="s3://bucket/set")
    (tmp_path / "shards").symlink_to(shards)
    fresh = write_run(tmp_path, "toy", {"name": "toys.linear"})
    best = fresh / "distill" / "checkpoints" / "best"
    weights = best.parent / "step-00000001" / "both.safetensors"
    weights.rename(tmp_path / "kept")
    fails("no weights", fresh)
    best.unlink()
    fails("stage distill has no best checkpoint", fresh)
    config = yaml.safe_load((run / "config.yaml").read_text())
    best.write_text("step-00000001")
    (tmp_path / "kept").rename(weights)
    (fresh / "config.yaml").write_text(yaml.safe_dump(config | {"evaluate": {"networks": ["critic"]}}))
    fails("evaluate.networks: 'critic' is not trained or not scored; choose from student, teacher", fresh)
    (fresh / "config.yaml").write_text(yaml.safe_dump(config | {"method": {"name": "toys.co_trained"}}))
    fails("does not fit network student", fresh)


def test_weights_are_read_by_name(run, shards):
    trained = open_run(run)
    assert trained.networks == ("student", "teacher") and trained.predictor().window == CROP
    method, _ = method_and_source(shards)
    for network in method.networks.values():
        torch.nn.init.zeros_(network[0].weight)
    load_weights(method.networks["teacher"], "teacher", best_files(run, "distill"), None)
    assert method.networks["teacher"][0].weight.abs().sum() > 0 and method.networks["student"][0].weight.abs().sum() == 0
    assert load_networks(run, method) == {"student", "teacher"} and method.networks["student"][0].weight.abs().sum() > 0
    assert safetensors_of(run) == best_files(run, "distill") == safetensors_of(best_files(run, "distill")[0])
    with pytest.raises(UserError, match="no network critic here; there are student, teacher"):
        load_weights(method.networks["teacher"], "teacher", best_files(run, "distill"), "critic")
    with pytest.raises(UserError, match="neither a safetensors file nor a run folder"):
        safetensors_of(shards)


def test_real_case_counts_an_empty_region_and_the_brats_penalty(tmp_path):
    if not REAL_CASE.is_dir():
        pytest.skip(f"no folder {REAL_CASE}")
    spec = yaml.safe_load((SPEC_FOLDER / "brats2018.yaml").read_text()) | {"name": "real", "layout": "flat", "patient": None}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    pred = tmp_path / "pred"
    pred.mkdir()
    shutil.copy(REAL_CASE / "TCGA-DU-7294_seg.nii.gz", pred / "TCGA-DU-7294.nii.gz")
    given = evaluate_predictions(pred, REAL_CASE, str(tmp_path / "real.yaml"), tmp_path / "perfect")["subsets"]["given"]
    assert all(cell["dice"] == 1 and cell["hd95_mm"] == 0 for cell in given.values())
    assert given["ET"]["n_nonempty"] == 0 and given["ET"]["dice_nonempty"] is None and given["WT"]["n_nonempty"] == 1
    truth = nib.load(REAL_CASE / "TCGA-DU-7294_seg.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(truth.shape, np.uint8), truth.affine), pred / "TCGA-DU-7294.nii.gz")
    given = evaluate_predictions(pred, REAL_CASE, str(tmp_path / "real.yaml"), tmp_path / "empty")["subsets"]["given"]
    assert given["WT"]["hd95_mm"] == pytest.approx(373.13, abs=5e-3) and given["WT"]["missed"] == 1
    assert (given["ET"]["dice"], given["ET"]["hd95_mm"]) == (1.0, 0.0)
