"""Evaluated runs compared: who forms an arm, what is refused, real evaluations."""

import csv
import json
import sys

import numpy as np
import pytest
import yaml
from evaluated_runs import PATIENTS, REGIONS, SUBSETS, flat, noisy, write_arms, write_cohort, write_run
from scipy import stats
from trained_run import make_run
from trained_run import write_run as write_real_run

from mstkd.compare.arms import without_seed
from mstkd.compare.run import compare
from mstkd.errors import UserError
from mstkd.evaluate.run import evaluate_run
from mstkd.launch.cli import main
from mstkd.run_folder import best_steps

@pytest.fixture
def shards(tmp_path):
    return write_cohort(tmp_path / "shards", PATIENTS)


def scores(run):
    """(subject, subset, region) -> Dice of the student in per_case.csv."""
    rows = csv.DictReader((run / "evaluation" / "per_case.csv").open())
    return {(r["subject"], r["subset"], r["region"]): float(r["dice"]) for r in rows if r["network"] == "student"}


def refused(match, *arguments, **options):
    with pytest.raises(UserError, match=match) as caught:
        compare(*arguments, **options)
    assert "\n" not in str(caught.value)


# figures


def test_figures_are_those_of_the_patients(shards, tmp_path):
    runs = write_arms(shards)
    found = compare(runs, tmp_path / "out", baseline="kd", seed=3)
    tables = [scores(run) for run in runs]
    for region in REGIONS:
        values = [[np.mean([table[s, u, region] for u in SUBSETS]) for s in PATIENTS] for table in tables]  # run x patient
        kd, teacher = np.mean(values[:2], axis=0), np.mean(values[2:], axis=0)
        cell, (test,) = found.mean("mean_teacher", region), [t for t in found.tests if t.measure == region]
        assert cell.score.value == pytest.approx(teacher.mean()) and cell.difference.value == pytest.approx((teacher - kd).mean())
        assert cell.difference.low < cell.difference.value < cell.difference.high and cell.score.low < cell.score.value < cell.score.high
        assert cell.beside == pytest.approx(10 * (1 - teacher.mean())) and (cell.patients, cell.seeds) == (8, 2)
        assert test.p == pytest.approx(stats.wilcoxon(teacher - kd, zero_method="zsplit").pvalue)
        assert test.seed_sd == pytest.approx(np.std([np.mean(v) for v in values[2:]], ddof=1))
        assert test.baseline_seed_sd == pytest.approx(np.std([np.mean(v) for v in values[:2]], ddof=1))
        assert (test.primary, test.patients, test.patterns) == (True, 8, 15)
        assert found.mean("kd", region).difference is None
        paired = [np.mean([t[s, "t1+t2", region] for t in tables[2:]]) - np.mean([t[s, "t1+t2", region] for t in tables[:2]]) for s in PATIENTS]
        single = found.cells["mean_teacher", "t1+t2", region]
        assert single.difference.value == pytest.approx(np.mean(paired)) and single.p == pytest.approx(stats.wilcoxon(paired).pvalue)
    p_values = sorted(test.p for test in found.tests)
    assert sorted(test.p_holm for test in found.tests)[0] == pytest.approx(3 * p_values[0])


def test_the_same_seed_gives_the_same_intervals_whoever_else_is_compared(shards, tmp_path):
    runs = write_arms(shards)
    alone = compare(runs, tmp_path / "a", baseline="kd", seed=3)
    third = write_run(shards, "shaspec", noisy(0.4, 7), method={"name": "mst_kdnet"})
    beside = compare([third, *runs], tmp_path / "b", baseline="kd", seed=3)
    assert alone.mean("mean_teacher", "ET") == beside.mean("mean_teacher", "ET")
    other = compare(runs, tmp_path / "c", baseline="kd", seed=4)
    assert other.mean("mean_teacher", "ET").difference.low != alone.mean("mean_teacher", "ET").difference.low


def test_a_patient_with_two_scans_counts_once(tmp_path):
    shards = write_cohort(tmp_path / "shards", PATIENTS | {"again0": "P0"})
    runs = [write_run(shards, "a", flat(0.3)), write_run(shards, "b", lambda s, u, r: 0.9 if s == "again0" else 0.5, method={"name": "mst_kdnet"})]
    found = compare(runs, tmp_path / "out")
    cell = found.mean("mst_kdnet", "WT")
    assert cell.patients == 8 and cell.score.value == pytest.approx((7 * 0.5 + (0.5 + 0.9) / 2) / 8)
    assert "8 patients, 9 scans" in found.facts["test set"]


def test_a_case_without_a_sequence_counts_where_it_can(shards, tmp_path):
    lacks = {"scan3": "t1ce"}
    runs = [write_run(shards, "a", flat(0.3), lacks=lacks), write_run(shards, "b", flat(0.4), lacks=lacks, method={"name": "mst_kdnet"})]
    found = compare(runs, tmp_path / "out")
    assert {found.cells["kd", subset, "WT"].patients for subset in SUBSETS if "t1ce" in subset} == {7}
    assert found.cells["kd", "flair", "WT"].patients == 8 and found.mean("kd", "WT").patients == 8
    assert found.facts["missing sequences"].startswith("1 patients lack some")


def test_equal_arms_are_equal_and_few_patients_get_no_p(tmp_path):
    shards = write_cohort(tmp_path / "shards", dict(list(PATIENTS.items())[:5]))
    found = compare([write_run(shards, "a", flat(0.3)), write_run(shards, "b", flat(0.3), method={"name": "mst_kdnet"})], tmp_path / "out")
    test = found.tests[0]
    assert test.p is None and test.p_holm is None and "5 patients" in test.says and test.seed_sd is None
    assert (test.difference.value, test.difference.low, test.difference.high) == (0, 0, 0)
    assert "1 seed: seed spread unknown" in found.facts["seeds"]


# arms


def test_runs_that_differ_only_in_seed_are_one_arm(shards, tmp_path):
    found = compare(write_arms(shards, seeds=(0, 1, 2)), tmp_path / "out")
    assert {label: arm.seeds for label, arm in found.arms.items()} == {"kd": (0, 1, 2), "mean_teacher": (0, 1, 2)}
    assert found.baseline == "kd" and found.arms["mean_teacher"].settings["method.name"] == "mean_teacher"


def test_arms_of_one_method_are_told_apart_by_what_differs(shards, tmp_path):
    def run(name, seed=0, **method):
        return write_run(shards, name, noisy(0.5, seed), seed=seed, method={"name": "kd", **method})

    runs = [run("full"), run("full_s1", 1), run("hot", tau=10), run("no-map", tau=10, maps=False)]
    found = compare(runs, tmp_path / "out", baseline="full")
    assert list(found.arms) == ["kd", "kd tau=10", "kd tau=10 maps=false"] and found.arms["kd"].seeds == (0, 1)
    assert found.arms["kd tau=10"].settings == {"method.tau": 10, "method.maps": None}
    many = [run("wide-seed0", a=1, b=1, c=1), run("narrow-seed0", a=2, b=2, c=2)]
    assert list(compare(many, tmp_path / "many").arms) == ["wide", "narrow"]


def test_another_way_to_predict_is_another_arm_and_other_logging_is_not(shards, tmp_path):
    runs = [write_run(shards, "a", flat(0.3)), write_run(shards, "b", flat(0.3), seed=1, checkpoint={"keep": 7}, tracking={"experiment": "x"})]
    runs.append(write_run(shards, "c", flat(0.4), inference={"overlap": 0.25}))
    assert list(compare(runs, tmp_path / "out").arms) == ["kd", "kd overlap=0.25"]


def test_a_name_without_its_seed():
    names = {"kd-seed3": "kd", "kd_s3": "kd", "kd-3": "kd", "kdseed3": "kd", "kd3": "kd3", "kd-13": "kd-13"}
    assert {name: without_seed(name, 3) for name in names} == names


def test_one_run_per_subset_is_one_arm(shards, tmp_path):
    own = [
        write_run(shards, f"own-{n}-{seed}", flat(0.6), seed=seed, method={"name": "dedicated", "subset": subset}, subsets=[subset])
        for n, subset in enumerate(SUBSETS[:12]) for seed in (0, 1) if (n, seed) != (11, 1)
    ]  # fmt: skip
    found = compare([write_run(shards, "kd", flat(0.5)), *own], tmp_path / "out")
    arm = found.arms["dedicated"]
    assert arm.seeds == (0, 1) and arm.patterns == tuple(SUBSETS[:11]) and len(arm.runs) == 23  # one seed lacks the twelfth
    assert ("dedicated", SUBSETS[11], "WT") not in found.cells and found.cells["kd", SUBSETS[11], "WT"].patients == 8
    assert found.tests[0].patterns == 11 and found.mean("dedicated", "WT").difference.value == pytest.approx(0.1)
    assert found.facts["subsets, dedicated"].startswith("differences of means are over the 11 subsets that both have: flair, t1,")


def test_labels_may_be_given(shards, tmp_path):
    kd0, kd1, teacher0, teacher1 = write_arms(shards)
    found = compare({"ours": [teacher0, teacher1], "theirs": [kd0, kd1]}, tmp_path / "out", baseline="theirs")
    assert list(found.arms) == ["theirs", "ours"] and found.mean("ours", "WT").seeds == 2
    refused("arm mixed: .*teacher-seed1 and .*kd-seed0 differ in method.name; an arm's runs differ only in seed", {"mixed": [kd0, teacher1]})


def test_one_arm_may_be_the_one_that_was_fixed_before_looking(shards, tmp_path):
    runs = [*write_arms(shards), write_run(shards, "third", noisy(0.4, 5), method={"name": "mst_kdnet"})]
    found = compare(runs, tmp_path / "out", baseline=str(runs[1]), primary="third")
    assert found.baseline == "kd" and {test.arm for test in found.tests if test.primary} == {"mst_kdnet"} and len(found.tests) == 6
    assert "all tests of other arms than mst_kdnet" in found.facts["exploratory"]
    assert "Holm does not reach across arms" in compare(runs, tmp_path / "all").facts["several arms"]
    refused("--baseline nobody: neither an arm nor a run that was given; arms: kd, mean_teacher, mst_kdnet", runs, baseline="nobody")
    refused("--primary kd: that is the baseline", runs, baseline="kd", primary="kd")


def test_an_oracle_is_shown_and_not_tested(shards, tmp_path):
    runs = [*write_arms(shards), write_run(shards, "guided", flat(0.9), method={"name": "guided"}, oracle=True)]
    found = compare(runs, tmp_path / "out")
    assert {test.arm for test in found.tests} == {"mean_teacher"} and found.cells["guided", "t1", "WT"].p is None
    assert found.mean("guided", "WT").difference.value > 0 and "neither tested nor ranked" in found.facts["oracle"]


# refusals


def test_what_cannot_be_compared_is_refused(shards, tmp_path):
    first = write_run(shards, "first", flat(0.5))
    fresh = write_run(shards, "fresh", flat(0.5), seed=1)
    (fresh / "evaluation" / "summary.json").unlink()
    refused(f"{fresh}: not evaluated on its test split yet; run `mstkd evaluate {fresh}` first", [first, fresh])
    refused("is not a run folder", [first, tmp_path])
    refused("no runs; give at least two", [])
    refused("only one arm: first, again differ in nothing but the seed", [first, write_run(shards, "again", flat(0.5), seed=2)])
    refused("have the same settings and seed 0; give one of them", [first, write_run(shards, "twin", flat(0.5))])
    fewer = write_run(shards, "fewer", flat(0.5), method={"name": "x"}, subjects=[*PATIENTS][:3] + [*PATIENTS][4:])
    refused(r"have other test sets: case scan3 \(flair\) is in .*first and not in .*fewer", [first, fewer])
    other = write_run(shards, "other", flat(0.5), method={"name": "x"}, truth_voxels=99)
    refused("other test sets: the truth of case scan0, WT, has 99 and 100 voxels", [first, other])
    reference = write_run(shards, "reference", flat(0.5), method={"name": "x"}, evaluate={"empty": "reference"})
    refused("scored by other conventions: hd95_empty is .*one empty the image diagonal.* in the first and .*one empty also 0.* in the second", [first, reference][::-1])
    allowed = write_run(shards, "allowed", flat(0.5), method={"name": "x"})
    refused("--published nothing: no such table", [first, allowed], published=["nothing"])


def test_a_run_that_was_trained_on_after_its_evaluation_is_refused(shards, tmp_path):
    first, second = write_run(shards, "first", flat(0.5)), write_run(shards, "second", flat(0.5), method={"name": "x"})
    pointer = second / "distill" / "checkpoints" / "best"
    pointer.parent.mkdir(parents=True)
    pointer.write_text("step-00000100\n")
    (second / "evaluation" / "weights.json").write_text(json.dumps(best_steps(second)))
    compare([first, second], tmp_path / "out")
    pointer.write_text("step-00000200\n")
    refused(f"{second}: was trained on after its evaluation; run `mstkd evaluate {second}` again", [first, second])


def test_files_that_disagree_are_refused(shards):
    run = write_run(shards, "run", flat(0.5))
    path = run / "evaluation" / "per_case.csv"
    text = path.read_text()
    path.write_text(text.replace("student,scan1,t1,TC,0.51", "student,scan1,t1,TC,0.91"))
    refused("per_case.csv and summary.json disagree on t1, TC; run `mstkd evaluate", [run, run])
    path.write_text("\n".join(text.splitlines()[:40]))
    refused("disagree on", [run, run])
    path.write_text(text.replace("dice,", "accuracy,", 1))
    refused("neither dice nor psnr; only runs of segmentation and synthesis can be compared", [run, run])
    path.write_text(text.splitlines()[0])
    refused("no cases; run `mstkd evaluate", [run, run])


def test_a_training_patient_in_the_test_set_is_refused_unless_it_was_allowed(tmp_path):
    shards = write_cohort(tmp_path / "shards", PATIENTS | {"train1": "P2"}, train=["train0", "train1"])
    first = write_run(shards, "first", flat(0.5))
    second = write_run(shards, "second", flat(0.6), method={"name": "x"})
    refused("first: test case scan2 and training case train1 are of one patient; leave the run out, or", [first, second])
    note = {"overlap": "ALLOWED OVERLAP: 1 of these cases were seen in training; the figures are optimistic"}
    allowed = [write_run(shards, f"allowed{n}", flat(0.5), method={"name": f"m{n}"}, notes=note) for n in (0, 1)]
    found = compare(allowed, tmp_path / "out")
    assert found.arms["m0"].notes == (f"overlap: {note['overlap']}",)
    assert (tmp_path / "out" / "compare.html").read_text().count(note["overlap"]) == 2


def test_patients_come_from_whatever_shard_set_is_at_hand(shards, tmp_path):
    runs = write_arms(shards, seeds=(0,))
    shards.rename(tmp_path / "moved")
    refused(r"test case scan0: no shard set at hand says whose scan it is \(.*shards is not here or lacks it\); say --shards DIR", runs)
    refused("--shards .*nowhere: not a readable shard set", runs, shards=tmp_path / "nowhere")
    found = compare(runs, tmp_path / "out", shards=tmp_path / "moved")
    assert "overlap" not in found.facts  # the same bytes: checked there
    splits = tmp_path / "moved" / "splits.json"
    splits.write_text(splits.read_text() + " ")
    found = compare(runs, tmp_path / "out", shards=tmp_path / "moved")
    assert found.facts["overlap"].startswith("not checked again for kd-seed0, mean_teacher-seed0")


# with real evaluations, the command, MLflow


def test_really_evaluated_runs_can_be_compared(tmp_path):
    real = make_run(tmp_path)
    other = write_real_run(tmp_path, "other", {"name": "toys.co_trained"})
    for run in (real, other):
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"evaluate": {"networks": ["student"]}}))
    summaries = [evaluate_run(run) for run in (real, other)]
    found = compare([real, other], tmp_path / "out")
    for label, summary in zip(("toys.linear", "toys.co_trained"), summaries):
        for region in REGIONS:
            assert found.mean(label, region).score.value == pytest.approx(summary["mean"][region]["dice"])
            assert found.cells[label, "t1+t2", region].beside == pytest.approx(summary["subsets"]["t1+t2"][region]["hd95_mm"])
        assert found.arms[label].costs.scored_parameters > 0
    assert "overlap" not in found.facts and "fewer than 6" in found.tests[0].says


def test_the_command_writes_beside_the_runs_and_ends_with_2_on_bad_input(shards, capsys, monkeypatch):
    runs = write_arms(shards, seeds=(0,))

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["mstkd", "compare", *map(str, runs), *words])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, capsys.readouterr()

    code, said = command()
    out = shards.parent / "runs" / "compare-mean_teacher-against-kd"
    assert code == 0 and "mean_teacher" in said.out and f"report: {out / 'compare.html'}" in said.out.replace("\n", "")
    assert {"compare.html", "compare.csv", "primary.csv", "box_plots.png"} <= {path.name for path in out.iterdir()}
    code, said = command("--baseline", "nobody")
    assert code == 2 and said.err.startswith("error: --baseline nobody") and said.err.count("\n") == 1


def test_a_tracked_comparison_lies_beside_its_first_run(shards, tmp_path):
    from mlflow import MlflowClient

    from mstkd.config import read_recipe
    from mstkd.track import open_trackers

    runs = write_arms(shards, seeds=(0,))
    config = read_recipe(runs[0] / "config.yaml")
    with open_trackers(config, runs[0], attempt=1, tags={}, dataset={"name": "made", "digest": "0"}):
        pass
    found = compare(runs, tmp_path / "out")
    client = MlflowClient(f"sqlite:///{runs[0].parent / 'mlflow.db'}")
    trained = client.get_run(yaml.safe_load((runs[0] / "mlflow.json").read_text())["run_id"])
    kept = client.search_runs([trained.info.experiment_id], "tags.baseline = 'kd'")
    assert [run.info.run_name for run in kept] == ["out"] and kept[0].info.status == "FINISHED" and trained.info.status == "FINISHED"
    assert kept[0].data.metrics["dice/ET/mean_teacher"] == pytest.approx(found.mean("mean_teacher", "ET").score.value)
    names = {item.path for item in client.list_artifacts(kept[0].info.run_id, "compare")}
    assert names == {f"compare/{path.name}" for path in (tmp_path / "out").iterdir()}


def test_figures_that_stand_beside_are_no_reason_to_refuse(shards, tmp_path):
    older, newer = write_run(shards, "older", flat(0.5)), write_run(shards, "newer", flat(0.6), method={"name": "x"}, evaluate={"calibration": True, "assd": True})
    summary = json.loads((older / "evaluation" / "summary.json").read_text())
    del summary["conventions"]["sensitivity"], summary["conventions"]["volumes"]  # as evaluated before there were any
    (older / "evaluation" / "summary.json").write_text(json.dumps(summary))
    assert compare([older, newer], tmp_path / "out").mean("x", "WT").difference.value == pytest.approx(0.1)
