"""A synthesis run's evaluation: its files, pictures, floor, features, and what MLflow gets."""

import csv
import re

import matplotlib.image
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from small_synthesis import PAIRS, SINGLE, read, read_rows, root, run, write  # noqa: F401  (root and run are fixtures)

from mstkd.evaluate import fused
from mstkd.evaluate.completion_figures import _mosaic
from mstkd.evaluate.figures import oriented
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.perceptual import perceptual_distance
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.synthesis import copied
from mstkd.methods._translation import Masks
from mstkd.trained_run import open_run

CELL = {"psnr", "ssim", "local_psnr", "local_ssim", "n", "local_n", "brain_psnr", "brain_ssim", "z_gradient", "spectrum_db"}


def test_summaries_have_the_documented_shape_and_mark_the_oracle(run):
    student, teacher = read(run / "evaluation" / "summary.json"), read(run / "evaluation" / "summary_teacher.json")
    assert list(student) == ["method", "split", "fold", "patterns", "by_missing", "mean", "conventions"]
    assert open_run(run, tasks=("synthesis",)).networks == ("student", "teacher")  # though the method names its oracle first
    assert "oracle" not in student and teacher["oracle"] is True and "not ranked" in teacher["conventions"]["oracle"]
    for summary in (student, teacher):
        assert (summary["method"], summary["split"], summary["fold"]) == ("toys.copying", "test", 0)
        assert list(summary["patterns"]) == PAIRS and list(summary["by_missing"]) == ["3"]
        assert all(set(cell) == CELL for cell in (*summary["patterns"].values(), summary["mean"]))
    assert student["mean"]["local_psnr"] > teacher["mean"]["local_psnr"]  # the oracle did see the label: it paints WT black
    installed = perceptual_distance(torch.device("cpu")) is not None
    assert ("not measured" in student["conventions"]["lpips"]) != installed


def test_summary_is_the_mean_of_the_cases(run):
    summary, rows = read(run / "evaluation" / "summary.json"), read_rows(run)
    for pattern, cell in summary["patterns"].items():
        mine = [row for row in rows if (row["network"], row["pattern"]) == ("student", pattern)]
        assert cell["n"] == len(mine) == 2 and cell["local_n"] == sum(int(row["local_slices"]) > 0 for row in mine)
        for key in ("psnr", "ssim", "brain_psnr", "brain_ssim", "z_gradient", "spectrum_db"):
            assert cell[key] == pytest.approx(np.mean([float(row[key]) for row in mine]))
    for key in ("psnr", "ssim"):
        assert summary["mean"][key] == pytest.approx(np.mean([cell[key] for cell in summary["patterns"].values()]))
        assert summary["by_missing"]["3"][key] == summary["mean"][key]
    assert summary["mean"]["n"] == 24


def test_the_folder_holds_report_costs_and_pictures(run):
    folder = run / "evaluation"
    pictures = {"heat_map_student.png", "heat_map_teacher.png", "completed_best.png", "completed_worst.png"}
    files = {"summary.json", "summary_teacher.json", "per_case.csv", "copy_per_case.csv", "baseline.json", "weights.json", "cost.json", "report.html"}
    assert {path.name for path in folder.iterdir()} == {*files, *pictures}
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4 and html.count("<td>t1ce-&gt;t2</td>") == 2 and "teacher (oracle)" in html
    assert f"<td class=\"first\">{read(folder / 'summary.json')['mean']['psnr']:.2f}</td>" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert html.count("z gradient</th>") == 3 and f"<td class=\"first\">{read(folder / 'summary.json')['mean']['z_gradient']:.4f}</td>" in html
    for name in pictures:
        pixels = matplotlib.image.imread(folder / name)
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05
    shown = matplotlib.image.imread(folder / "completed_best.png")[..., :3]
    assert ((shown[..., 0] > 0.9) & (shown[..., 1:] < 0.1).all(-1)).sum() > 500  # the red lines round the tumour
    cost = read(folder / "cost.json")["student"]
    assert cost["predictions"] == 2 * 4 and 0 < cost["seconds_per_slice"] < cost["seconds_per_case"] and cost["peak_memory_gib"] > 0


def test_the_floor_is_a_given_sequence_in_place_of_the_missing_one(run):
    """The first toy copies the given sequence itself, so it scores as the floor does."""
    floor = list(csv.DictReader((run / "evaluation" / "copy_per_case.csv").open()))
    own = [row for row in read_rows(run) if row["network"] == "student"]
    assert {row["network"] for row in floor} == {"copy"} and len(floor) == len(own)
    for ours, theirs in zip(floor, own, strict=True):
        assert (ours["subject"], ours["pattern"]) == (theirs["subject"], theirs["pattern"])
        assert all(float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-5) for key in ("psnr", "ssim", "local_psnr", "local_ssim") if ours[key])
    mean = read(run / "evaluation" / "baseline.json")["copy"]
    assert mean["psnr"] == pytest.approx(read(run / "evaluation" / "summary.json")["mean"]["psnr"], rel=1e-5)
    assert "SSIM" in (run / "evaluation" / "report.html").read_text().split("floor")[1][:300]
    images = torch.rand(2, 4, 5, 5)
    first_given = copied(images, (False, True, False, True))
    assert torch.equal(first_given[:, [1, 3]], images[:, [1, 3]]) and torch.equal(first_given[:, [0, 2]], images[:, [1, 1]])


def test_the_students_features_are_measured_against_the_teachers(root):
    sections = {"network": {"width": 2, "levels": 2}, "critic": {"width": 2, "layers": 3}}
    folder = write(root, "features", {"name": "utad_net", **sections}, evaluate={"networks": ["student", "teacher"]})
    evaluate_run(folder)
    found = read(folder / "evaluation" / "fused_features.json")
    opened = open_run(folder, tasks=("synthesis",))
    completer, squares, absolutes = opened.completer(), [], []
    subjects = opened.source.subjects("test")
    with evaluation_mode(opened.method):
        for subject in subjects:
            case = completer.slices(opened.source.subject(subject))
            for m in range(4):
                available = torch.eye(4, dtype=torch.bool)[[m] * len(case.position)]
                ours, theirs = (opened.method.fused(case.image, available, case.label, name) for name in ("student", "teacher"))
                squares.append(float((ours - theirs).square().mean()))
                absolutes.append(float((ours - theirs).abs().mean()))
    assert found["mae"] == pytest.approx(np.mean(absolutes), rel=1e-4) and found["mse"] == pytest.approx(np.mean(squares), rel=1e-4)
    assert found["mae"] > 0 and (found["n"], found["channels"]) == (len(subjects), 8)
    assert (folder / "evaluation" / "fused_features.png").is_file() and "features of the student" in (folder / "evaluation" / "report.html").read_text()


def test_features_equal_to_the_teachers_have_no_error_and_one_network_alone_is_not_measured(root):
    opened = open_run(root / "runs" / "features", tasks=("synthesis",))
    opened.method.networks["student"].load_state_dict(opened.method.networks["teacher"].state_dict())
    opened.method.masks = Masks("region", (0, 1, 2, 4))  # all is tumour: the teacher sees what the student does
    completer, subjects = opened.completer(), opened.source.subjects("test")[:1]
    assert fused.measure(completer, ["student", "teacher"], opened.source, subjects).absolute.max() < 1e-6
    assert fused.measure(completer, ["student"], opened.source, subjects) is None
    assert fused.measure(completer, ["teacher"], opened.source, subjects) is None


def test_several_given_sequences_are_shown_side_by_side_from_the_top_left():
    tiles = [np.full((3, 3), value) for value in (1, 2, 3)]
    shown = oriented(_mosaic(tiles)[..., None], 2, 0)[::-1]  # rows from the top
    assert shown.tolist() == np.block([[tiles[0], tiles[1]], [tiles[2], 0 * tiles[0]]]).tolist()


def test_mlflow_gets_every_pattern_under_a_name_it_takes_and_no_subject(run):
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (evaluation,) = [found for found in runs if "student/psnr/t1_to_flair" in found.data.metrics]
    summary = read(run / "evaluation" / "summary.json")
    assert evaluation.data.metrics["student/psnr/t1_to_flair"] == pytest.approx(summary["patterns"]["t1->flair"]["psnr"])
    assert evaluation.data.metrics["teacher/ssim/mean"] == pytest.approx(read(run / "evaluation" / "summary_teacher.json")["mean"]["ssim"])
    names = {file.path.rpartition("/")[2] for file in client.list_artifacts(evaluation.info.run_id, "evaluation")}
    assert "completed_best.png" in names and "per_case.csv" not in names


def test_only_the_wanted_networks_are_scored_and_an_oracle_alone_stays_marked(run, root):
    summary = evaluate_run(write(root, "wanted", {**SINGLE, "given": ["t1"]}, evaluate={"networks": ["teacher"]}))
    both = read(run / "evaluation" / "summary_teacher.json")["patterns"]
    assert summary["oracle"] is True and summary["patterns"] == {name: cell for name, cell in both.items() if name.startswith("t1->")}
    assert not (root / "runs" / "wanted" / "evaluation" / "summary_teacher.json").exists()
