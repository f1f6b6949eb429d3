"""A comparison's files: tables, report, figures, the terminal, costs."""

import csv
import io
import json
import re
import struct

import pytest
from evaluated_runs import PATIENTS, REGIONS, SUBSETS, flat, noisy, pictures, write_arms, write_cohort, write_run
from rich.console import Console

from mstkd.compare.costs import Costs, parameter_counts, training_hours
from mstkd.compare.run import compare
from mstkd.compare.tables import print_comparison


@pytest.fixture
def shards(tmp_path):
    return write_cohort(tmp_path / "shards", PATIENTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    shards = write_cohort(folder / "shards", PATIENTS)
    runs = [*write_arms(shards), write_run(shards, "third", noisy(0.4, 5), method={"name": "mst_kdnet", "weights": {"a/b": 1}}, subsets=SUBSETS[:9])]
    return compare(runs, folder / "out", published=["mst_kdnet_brats2024", "shaspec_brats2018"])


def test_tables_hold_every_figure(written):
    rows = list(csv.DictReader((written.out / "compare.csv").open()))
    assert len(rows) == 3 * (16 + 16 + 10) == len(written.cells)
    for row in rows:
        cell = written.cells[row["arm"], row["subset"], row["region"]]
        assert float(row["dice"]) == cell.score.value and int(row["n_patients"]) == 8 and int(row["seeds"]) == cell.seeds
        assert (row["difference"] == "") == (row["arm"] == "kd") and (row["p_exploratory"] == "") == (row["arm"] == "kd" or row["subset"] == "mean")
    tests = list(csv.DictReader((written.out / "primary.csv").open()))
    assert [(t["arm"], t["region"], t["family"]) for t in tests] == [(a, r, "primary") for a in ("mean_teacher", "mst_kdnet") for r in REGIONS]
    assert [float(t["p_holm"]) for t in tests] == [test.p_holm for test in written.tests]
    assert tests[0]["n_subsets"] == "15" and tests[3]["n_subsets"] == "9" and tests[3]["seed_sd"] == ""


def test_the_report_is_whole_and_says_what_it_means(written):
    html = (written.out / "compare.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    for words in ("the patient: seeds and scans are averaged first", "percentile bootstrap, 10,000 replicates", "Holm over the 3 regions",
                  "<b>exploratory</b>", "1 seed: unknown", "conventions differ", "Published, conventions differ: MST-KDNet, results on BraTS 2024"):  # fmt: skip
        assert words in html, words
    assert html.count("<b>hd95_empty</b>") == 2 + 3 + 3 + 3  # under each table of scores: means, tests, regions, two published tables
    assert f"{100 * written.mean('mean_teacher', 'ET').score.value:.1f}" in html
    assert "68.6 / 4.5" in html and "65.0 / 59.4" in html and "(its cells: 59.69 / 7.23)" in html and "77.45" in html


def test_nobody_and_no_place_is_named(written):
    text = "".join((written.out / name).read_text() for name in ("compare.html", "compare.csv", "primary.csv"))
    text = re.sub(r"base64,[^\"]*", "", text)
    assert "kd-seed0" in text and str(written.out.parent) not in text
    assert not any(re.search(rf"\b{name}\b", text) for name in (*PATIENTS, *PATIENTS.values()))


def test_figures_are_drawn(written):
    assert pictures(written.out) == ["box_plots.png", "differences_1_mean_teacher.png", "differences_2_mst_kdnet.png"]


def test_the_terminal_shows_means_differences_and_p(written):
    stream = io.StringIO()
    print_comparison(written, Console(file=stream, width=80))
    text = stream.getvalue()
    test = next(test for test in written.tests if test.arm == "mean_teacher" and test.measure == "TC")
    line = next(line for line in text.splitlines() if f"{100 * test.difference.value:+.1f} [" in line and " TC " in line)
    assert f"{100 * written.mean('mean_teacher', 'TC').score.value:.1f}" in line
    assert "mst_kdnet_brats2024, as printed: conventions differ" in text and "81.8" in text and max(map(len, text.splitlines())) <= 80


def test_costs_are_read_from_the_run_folder(shards, tmp_path):
    run, other = write_run(shards, "run", flat(0.5)), write_run(shards, "other", flat(0.6), method={"name": "x"})
    start = json.loads((run / "attempts" / "0001.json").read_text())
    (run / "attempts" / "0001.json").write_text(json.dumps(start | {"started": "2026-01-01T00:00:00+0000"}))
    begun = 1767225600  # that moment
    records = [{"stage": "distill", "step": step, "time": begun + 1800 * step, "attempt": 1} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    best = run / "distill" / "checkpoints" / "step-00000001"
    best.mkdir(parents=True)
    (best.parent / "best").write_text(best.name + "\n")
    shapes = {"student.conv.weight": [4, 3, 2], "student.conv.running_mean": [4], "teacher.weight": [10], "student.scale": []}
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()} | {"__metadata__": {}}).encode()
    (best / "both.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    cost = {"seconds_per_case": 0.25, "predictions": 30, "device": "cpu"}
    (run / "evaluation" / "cost.json").write_text(json.dumps({"student": cost}))
    assert parameter_counts(run) == {"student": 25, "teacher": 10} and training_hours(run) == 1.5
    found = compare([run, other], tmp_path / "out").arms
    assert found["kd"].costs == Costs(scored_parameters=25, trained_parameters=35, hours=1.5, ranks=(2,), seconds_per_case=0.25, devices=("cpu",))
    assert found["x"].costs == Costs(scored_parameters=None, trained_parameters=None, hours=None, ranks=(2,), seconds_per_case=None, devices=())
