"""Evaluated synthesis runs compared: patterns by measures, oracles and the copy of the source beside the arms, what is refused."""

import csv
import io
import re

import numpy as np
import pytest
import yaml
from evaluated_runs import ALL_PATTERNS, PATIENTS, PATTERNS, likeness, pictures, write_cohort, write_run, write_translation
from rich.console import Console
from scipy import stats
from trained_run import make_run
from trained_run import write_run as write_real_run

from mstkd.compare.run import compare
from mstkd.compare.tables import print_comparison
from mstkd.errors import UserError
from mstkd.evaluate.run import evaluate_run

KEYS = ("psnr", "ssim", "local_psnr", "local_ssim")
SEQUENCES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def shards(tmp_path):
    return write_cohort(tmp_path / "shards", PATIENTS)


def level(value):
    """PSNR that depends on patient and pattern alone."""
    return lambda subject, pattern: value + 0.1 * int(subject[-1]) + 0.01 * len(pattern)


def noisy(value, draw):
    draws = np.random.default_rng(draw)
    return lambda subject, pattern: value + 0.1 * int(subject[-1]) + draws.normal(0, 0.5)


def figures(run, network="student"):
    """(subject, pattern, measure) -> figure in per_case.csv."""
    rows = csv.DictReader((run / "evaluation" / "per_case.csv").open())
    return {(row["subject"], row["pattern"], key): float(row[key]) for row in rows if row["network"] == network for key in KEYS}


def refused(match, *arguments, **options):
    with pytest.raises(UserError, match=match) as caught:
        compare(*arguments, **options)
    assert "\n" not in str(caught.value)


# figures


def test_figures_and_tests_are_those_of_the_patients(shards, tmp_path):
    runs = [write_translation(shards, f"{name}-seed{s}", noisy(value, 10 * value + s), seed=s, method={"name": name})
            for name, value in (("stargan", 20), ("utad_net", 21)) for s in (0, 1)]  # fmt: skip
    found = compare(runs, tmp_path / "out", baseline="stargan")
    tables = [figures(run) for run in runs]
    assert [measure.key for measure in found.measures] == [*KEYS] and found.patterns == tuple(PATTERNS)
    for key in KEYS:
        values = [[np.mean([table[s, p, key] for p in PATTERNS]) for s in PATIENTS] for table in tables]
        theirs, ours = np.mean(values[:2], axis=0), np.mean(values[2:], axis=0)
        cell, (test,) = found.mean("utad_net", key), [test for test in found.tests if test.measure == key]
        assert cell.score.value == pytest.approx(ours.mean()) and cell.difference.value == pytest.approx((ours - theirs).mean())
        assert cell.difference.low < cell.difference.value < cell.difference.high and np.isnan(cell.beside)
        assert test.p == pytest.approx(stats.wilcoxon(ours - theirs, zero_method="zsplit").pvalue) and (test.patients, test.patterns) == (8, 12)
        assert test.seed_sd == pytest.approx(np.std([np.mean(v) for v in values[2:]], ddof=1))
        paired = [np.mean([t[s, "t1->t2", key] for t in tables[2:]]) - np.mean([t[s, "t1->t2", key] for t in tables[:2]]) for s in PATIENTS]
        single = found.cells["utad_net", "t1->t2", key]
        assert single.difference.value == pytest.approx(np.mean(paired)) and single.p == pytest.approx(stats.wilcoxon(paired).pvalue)


def test_the_primary_family_is_psnr_and_ssim_and_holm_reaches_over_them(shards, tmp_path):
    runs = [write_translation(shards, "a", noisy(20, 0)), write_translation(shards, "b", noisy(20.2, 1), method={"name": "utad_net"})]
    tests = {test.measure: test for test in compare(runs, tmp_path / "out").tests}
    assert [key for key, test in tests.items() if test.primary] == ["psnr", "ssim"]
    assert tests["psnr"].p_holm == pytest.approx(min(1, 2 * tests["psnr"].p))  # equal p values: SSIM follows from PSNR here
    assert tests["local_psnr"].p_holm is None and tests["local_psnr"].p == pytest.approx(tests["psnr"].p)


def test_a_difference_by_hand(shards, tmp_path):
    runs = [write_translation(shards, "a", level(20)), write_translation(shards, "b", level(22), method={"name": "utad_net"})]
    found = compare(runs, tmp_path / "out")
    lengths = np.mean([len(pattern) for pattern in PATTERNS])
    assert found.mean("stargan", "psnr").score.value == pytest.approx(20 + 0.35 + 0.01 * lengths)
    for key, difference in (("psnr", 2), ("ssim", 0.05), ("local_psnr", 2), ("local_ssim", 0.05)):
        assert found.mean("utad_net", key).difference.value == pytest.approx(difference)
        assert found.cells["utad_net", "t1ce->t2", key].difference.value == pytest.approx(difference)


def test_patterns_that_only_one_arm_has_are_left_out_of_the_difference(shards, tmp_path):
    many = write_translation(shards, "many", lambda s, p: level(30 if "+" in p else 24)(s, p), method={"name": "m2dn"}, patterns=ALL_PATTERNS)
    found = compare([write_translation(shards, "one", level(22)), many], tmp_path / "out")
    assert len(found.patterns) == 28 and found.patterns[:3] == ("flair->t1", "flair->t1ce", "flair->t2") and found.patterns[-1] == "t1+t1ce+t2->flair"
    assert found.arms["stargan"].patterns == tuple(PATTERNS) and found.tests[0].patterns == 12
    assert found.mean("m2dn", "psnr").difference.value == pytest.approx(2)  # though its own mean is over more, and higher
    assert found.mean("m2dn", "psnr").score.value > found.mean("stargan", "psnr").score.value + 4
    assert found.cells["m2dn", "flair+t1->t2", "psnr"].difference is None and ("stargan", "flair+t1->t2", "psnr") not in found.cells
    assert found.facts["patterns, m2dn"].startswith("differences of means are over the 12 patterns that both have: flair->t1,")


def test_without_labels_there_are_no_local_measures_and_lpips_is_shown_where_all_have_it(shards, tmp_path):
    def runs(**options):
        return [write_translation(shards, f"{n}-{len(options)}-{options.get('labelled')}", level(20 + n), method={"name": f"m{n}"}, patterns=PATTERNS[:2], **options)
                for n in (0, 1)]  # fmt: skip

    assert [m.key for m in compare(runs(labelled=False), tmp_path / "a").measures] == ["psnr", "ssim"]
    with_lpips, without = runs(lpips=True), runs()
    found = compare(with_lpips, tmp_path / "b")
    assert [m.key for m in found.measures] == [*KEYS, "lpips"] and found.mean("m1", "lpips").difference.value == pytest.approx(-1 / 40)
    mixed = compare([with_lpips[0], without[1]], tmp_path / "c")
    assert "lpips" not in [m.key for m in mixed.measures] and mixed.conventions["lpips"] == "not compared: only some of the runs measured it"


# rows that are not ranked


def test_an_oracle_stands_beside_its_student_and_is_not_tested(shards, tmp_path):
    def arm(name, **method):
        return [write_translation(shards, f"{name}-seed{s}", noisy(21, s), seed=s, method={"name": "utad_net", **method}, oracle=level(25), patterns=PATTERNS[:3])
                for s in (0, 1)]  # fmt: skip

    runs = [write_translation(shards, "base", level(20), patterns=PATTERNS[:3]), *arm("full"), *arm("blind", mask="zeros")]
    found = compare(runs, tmp_path / "out")
    assert list(found.arms) == ["stargan", "utad_net", "utad_net teacher", "utad_net mask=zeros", "utad_net mask=zeros teacher"]
    teacher = found.arms["utad_net teacher"]
    assert (teacher.mark, teacher.seeds, teacher.notes) == ("oracle", (0, 1), ("oracle: was given labels",)) and not found.arms["utad_net"].mark
    assert found.mean("utad_net teacher", "psnr").difference.value == pytest.approx(5) and found.mean("utad_net teacher", "psnr").seeds == 2
    assert {test.arm for test in found.tests} == {"utad_net", "utad_net mask=zeros"}
    assert {cell.p for cell in found.cells.values() if cell.arm == "utad_net teacher"} == {None}
    assert found.facts["oracle"].startswith("utad_net teacher, utad_net mask=zeros teacher used the test cases' labels")
    for option in ("baseline", "primary"):
        refused(rf"--{option} utad_net teacher: is not ranked \(oracle\), so no test takes it in", runs, **{option: "utad_net teacher"})
    refused("arm ours teacher: a reference of the runs given is called so", {"ours": runs[1:3], "ours teacher": runs[:1]})


def test_the_copy_of_the_source_is_the_floor(shards, tmp_path):
    runs = [write_translation(shards, "one", level(22), copied=level(15)),
            write_translation(shards, "many", level(24), method={"name": "m2dn"}, patterns=ALL_PATTERNS, copied=level(15))]  # fmt: skip
    found = compare(runs, tmp_path / "out")
    assert list(found.arms) == ["stargan", "m2dn", "copy"]
    copy = found.arms["copy"]
    assert (copy.mark, copy.seeds, copy.runs, copy.seed_sd, copy.costs.ranks) == ("floor", (), (), None, ()) and copy.patterns == found.patterns
    assert found.mean("copy", "psnr").difference.value == pytest.approx(-7) and found.cells["copy", "t1->t2", "psnr"].p is None
    assert {test.arm for test in found.tests} == {"m2dn"} and "copy: the first given sequence, unchanged" in found.facts["floor"]
    assert "copy" not in found.facts["seeds"] and "copy" not in found.facts["primary tests"]


def test_runs_that_were_measured_against_other_images_are_refused(shards, tmp_path):
    first = write_translation(shards, "first", level(22), copied=level(15))
    other = write_translation(shards, "other", level(24), method={"name": "x"}, copied=level(15.01))
    refused(r"other and .*first were measured against other images: copying the source, flair->t1, scores psnr 15.1\d+ in the first and 15.0\d+ in the second on "
            r"case scan0; compare methods of one `intensity`", [first, other])  # fmt: skip
    short = write_translation(shards, "short", level(24), method={"name": "y"}, copied=level(15))
    path = short / "evaluation" / "copy_per_case.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    refused("copy_per_case.csv: holds other cases than per_case.csv; run `mstkd evaluate .*short` again", [first, short])


# refusals


def test_what_cannot_be_compared_is_refused(shards, tmp_path):
    first = write_translation(shards, "first", level(22))

    def other(name, **options):
        return write_translation(shards, name, level(23), method={"name": "x"}, **options)

    dice = write_run(shards, "dice", lambda subject, subset, region: 0.5)
    refused("dice is a run of segmentation and .*first of synthesis; compare runs of one task", [first, dice])
    refused(r"have other test sets: case scan3 \(flair->t1\) is in .*first and not in .*fewer", [first, other("fewer", subjects=[s for s in PATIENTS if s != "scan3"])])
    refused("have other test sets: the truth of case scan0, psnr, has 19 and 20 slices", [first, other("shorter", slices=19)])
    refused("have other test sets: the truth of case scan0, local_psnr, has 0 and 10 slices", [first, other("unlabelled", labelled=False)])
    refused("other conventions: images is .axial slices of 32 x 32 pixels.* in the first and .axial slices of 64 x 64", [first, other("smaller", size=32)])
    refused("--published mst_kdnet_brats2024: it has WT, TC, ET and these runs psnr, ssim, local_psnr, local_ssim; choose another table",
            [first, other("fine")], published=["mst_kdnet_brats2024"])  # fmt: skip


def test_files_that_disagree_are_refused(shards):
    run = write_translation(shards, "run", level(22))
    path = run / "evaluation" / "per_case.csv"
    text = path.read_text()
    changed = likeness(level(22)("scan1", "t1->t2"))
    path.write_text(text.replace(f"student,scan1,t1->t2,20,{changed.psnr},", "student,scan1,t1->t2,20,99,"))
    refused("per_case.csv and summary.json disagree on t1->t2, psnr; run `mstkd evaluate", [run, run])


# files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    shards = write_cohort(folder / "shards", PATIENTS)
    runs = [write_translation(shards, f"{name}-seed{s}", noisy(value, 10 * value + s), seed=s, method={"name": name}, copied=level(15), **more)
            for name, value, more in (("stargan", 20, {}), ("utad_net", 21, {"oracle": level(25)})) for s in (0, 1)]  # fmt: skip
    return compare(runs, folder / "out", published=["utad_brats2020"])


def test_tables_hold_every_figure(written):
    rows = list(csv.DictReader((written.out / "compare.csv").open()))
    assert len(rows) == 4 * 13 * 4 == len(written.cells) and "hd95_mm" not in rows[0]
    for row in rows:
        cell = written.cells[row["arm"], row["pattern"], row["measure"]]
        assert float(row["score"]) == cell.score.value and int(row["n_patients"]) == 8 and int(row["seeds"]) == {"copy": 0}.get(row["arm"], 2)
        assert (row["p_exploratory"] == "") == (row["arm"] != "utad_net" or row["pattern"] == "mean")
    tests = list(csv.DictReader((written.out / "primary.csv").open()))
    assert [(t["arm"], t["measure"], t["family"], t["n_patterns"]) for t in tests] == [
        ("utad_net", key, "exploratory" if "local" in key else "primary", "12") for key in KEYS
    ]


def test_the_report_speaks_of_psnr_and_ssim_and_not_of_dice(written):
    html = (written.out / "compare.html").read_text()
    text = re.sub(r'base64,[^"]*', "", html)
    assert not re.search(r"Dice|HD95|(?:the|single|<th[^>]*>) ?subset|region", text)
    for words in ("Mean over patterns", "mean-over-patterns score of utad_net against stargan in PSNR, SSIM", "Holm over the 2 measures", "PSNR dB",
                  "p values of single patterns, local PSNR, local SSIM, unadjusted", "t1ce-&gt;t2", "(oracle)", "(floor)", "PSNR in dB, SSIM from 0 to 1",
                  "Published, conventions differ: UTAD-Net", "31.48±1.26", "Teacher WT (oracle)", "0.0655±0.0214"):  # fmt: skip
        assert words in text, words
    assert f"{written.mean('utad_net', 'ssim').score.value:.4f}" in text and f"{written.mean('utad_net', 'psnr').difference.value:+.2f}" in text
    assert not any(re.search(rf"\b{name}\b", text) for name in (*PATIENTS, *PATIENTS.values())) and str(written.out.parent) not in text


def test_figures_are_drawn(written):
    names = ["box_plots.png", "differences_1_utad_net.png", "differences_2_utad_net-teacher.png", "differences_3_copy.png"]
    assert pictures(written.out) == names


def test_the_terminal_shows_means_differences_and_p(written):
    stream = io.StringIO()
    print_comparison(written, Console(file=stream, width=100))
    lines = stream.getvalue().splitlines()
    test = next(test for test in written.tests if test.measure == "local_ssim")
    (line,) = [line for line in lines if "local SSIM" in line and f"{test.difference.value:+.4f} [" in line]
    assert "expl." in line and f"{written.mean('utad_net', 'local_ssim').score.value:.4f}" in line and max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    assert "PSNR and SSIM over patterns, against stargan" in text and "copy (floor)" in text and "(oracle)" in text and "31.48±1.26" in text and "Dice" not in text


# with real evaluations, MLflow


def test_really_evaluated_runs_can_be_compared(tmp_path):
    from mlflow import MlflowClient

    from mstkd.run_folder import read_run_config
    from mstkd.track import open_trackers

    make_run(tmp_path)
    runs = []
    for name, method in (("one", {"given": ["t1", "t2"]}), ("any", {"given": ["t1", "t1+t2"], "noise": 0.1})):
        runs.append(write_real_run(tmp_path, name, {"name": "toys.copying", **method}, None, {"size": 32}))
        config = yaml.safe_load((runs[-1] / "config.yaml").read_text())
        (runs[-1] / "config.yaml").write_text(yaml.safe_dump(config | {"inference": {"batch": 8, "precision": "fp32"}}))
    open_trackers(read_run_config(runs[0]), runs[0], attempt=1, tags={}, dataset={"name": "phantom", "digest": "0" * 64}).finish("FINISHED")
    summaries = [evaluate_run(run) for run in runs]
    found = compare({"one": runs[:1], "any": runs[1:]}, tmp_path / "out")
    assert [label for label in found.arms if label != "copy"] == ["one", "one teacher", "any", "any teacher"] and found.arms["any teacher"].mark == "oracle"
    for key in KEYS:
        assert found.mean("one", key).score.value == pytest.approx(summaries[0]["mean"][key])
        assert found.cells["any", "t1+t2->flair", key].score.value == pytest.approx(summaries[1]["patterns"]["t1+t2->flair"][key])
    assert found.mean("one teacher", "local_psnr").difference.value < 0 and "fewer than 6" in found.tests[0].says
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    everything = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (kept,) = [run for run in everything if run.info.run_name == "out"]
    assert kept.data.metrics["psnr/any"] == pytest.approx(found.mean("any", "psnr").score.value) and "difference/ssim/any" in kept.data.metrics
    assert "compare/compare.html" in {item.path for item in client.list_artifacts(kept.info.run_id, "compare")}
