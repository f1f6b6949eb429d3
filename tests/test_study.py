"""`mstkd study`: its recipe, its cohort, and a whole one interrupted and gone on with."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from tracked_runs import runs

from mstkd.config import RunConfig
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.methods import DataFacts, build
from mstkd.recipe import recipe_folder
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.study.cohort import prepare_cohort
from mstkd.study.config import CohortConfig, load_study, merged, run_config
from mstkd.study.run import run_study
from mstkd.study.runs import alone

MSTKD = Path(sys.executable).parent / "mstkd"
SEQUENCES = ("flair", "t1", "t1ce", "t2")
TESTS = Path(__file__).parent
PACKAGED = sorted(path.stem for path in recipe_folder().glob("study_*.yaml"))
QUESTIONS = {
    "study_phantom": {"": ("mst_kdnet", "student_only")},
    "study_utad_phantom": {"": ("utad_net", "stargan")},
    "study_m2dn_phantom": {"": ("m2dn", "one_shot")},
    "study_uhf_phantom": {
        "unet": ("unet_guided", "unet"), "segresnet": ("segresnet_guided", "segresnet"), "unet_controls": ("unet_longer", "unet_guided"),
        "segresnet_controls": ("segresnet_longer", "segresnet_guided"),
    },
}  # fmt: skip
DEADLINE_S = 600


def write(folder, **changes) -> str:
    """A study of two toys on twelve subjects; `changes` replace its keys."""
    arm = {"recipe": {"method": {"name": "toys.two_stage"}}, "tune": [{"method": {"weight": 0.5}}, {"method": {"weight": 2.0}}]}
    values = {
        "name": "toys", "runs_dir": str(folder / "runs"), "method": "heavy", "baseline": "light", "seeds": [7], "jobs": 2,
        "cohort": {"train": 3, "validation": 2, "test": 7, "size": 32}, "tuning": {"steps": 1},
        "common": {
            "data": {"crop": [16, 16, 16], "workers": 0}, "train": {"global_batch": 1, "steps": 3, "precision": "fp32"},
            "validate": {"subsets": ["t1", "t2"], "max_cases": 1}, "evaluate": {"networks": ["student"]},
        },
        "arms": {"light": arm, "heavy": {**arm, "recipe": {"method": {"name": "toys.two_stage"}, "train": {"steps": 6}}}},
    }  # fmt: skip
    path = folder / "toys.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", PACKAGED)
def test_every_arm_of_a_packaged_study_is_a_recipe_with_the_same_budget(name):
    study = load_study(name)
    assert len({len(arm.tune) for arm in study.arms.values() if arm.of is None}) == 1
    for arm in study.arms:
        assert RunConfig.model_validate(run_config(study, arm, "shards", "run", 1)).seed == 1
    assert study.cohort.test >= 8 and len(study.seeds) >= 3
    assert {key: (question.method, question.baseline) for key, question in study.comparisons.items()} == QUESTIONS[name]


def test_arms_of_translation_share_all_but_what_they_are_for_and_take_equally_many_steps():
    study, resolved = load_study("study_utad_phantom"), {}
    for arm in study.arms:
        config = resolved[arm] = RunConfig.model_validate(run_config(study, arm, "shards", "run", 1))
        method = build(config.method, DataFacts(SEQUENCES, LABEL_SCHEMES["brats2018"], None, slice_size=config.data.slices.size))
        assert len(method.stages) * config.train.steps == 300 and method.task == "synthesis"
        assert [name for name in method.scored if name in method.oracles] == ["teacher"] * (arm == "utad_net")  # the ablations' masks tell nothing
    assert [resolved[arm].method.get("mask") for arm in study.arms] == [None, None, "zeros", "random", None]
    assert len({str((config.data, config.train.roles, config.method["critic"], config.method["n_critic"])) for config in resolved.values()}) == 1


def test_guided_arms_and_controls_differ_in_what_they_are_for():
    study = load_study("study_uhf_phantom")
    for backbone, architecture in (("unet", "UNet"), ("segresnet", "SegResNet")):
        base, longer, *guided = (f"{backbone}{ending}" for ending in ("", "_longer", "_guided", "_3t", "_random", "_zeros"))
        config = {arm: RunConfig.model_validate(run_config(study, arm, "shards", "run", 1)) for arm in (base, longer, *guided)}
        steps = config[base].train.steps
        assert config[longer].train.steps["base"] == steps["base"] + steps["fusion"] and all(config[arm].train.steps == steps for arm in guided)
        assert len({(str(one.data), str(one.train.roles), str(one.method["base"])) for one in config.values()}) == 1
        assert {one.method["base"]["architecture"] for one in config.values()} == {architecture}
        assert [config[arm].method.get("keeper") for arm in guided] == [None, None, "random", "zeros"]
        takes = [study.arms[arm].takes for arm in guided]
        assert takes == [{"keeper": "keeper", "base": base}, {"keeper": "keeper_3t", "base": base}, {"base": base}, {"base": base}]
    pairs, control = (run_config(study, arm, "shards", "run", 1) for arm in ("keeper", "keeper_3t"))
    assert control.pop("method") == {**pairs.pop("method"), "high_field": "t1_3t"} and control == pairs and pairs["data"]["fold"] == 1


def test_the_arm_of_equal_flops_has_as_many_as_teacher_and_student_together():
    study, flops = load_study("study_phantom"), {}
    for arm in ("student_only_equal_flops", "mst_kdnet"):
        config = RunConfig.model_validate(run_config(study, arm, "shards", "run", 1))
        with torch.device("meta"):
            method = build(config.method, DataFacts(SEQUENCES, LABEL_SCHEMES["brats2018"], config.data.crop))
            image = torch.empty(1, 4, *config.data.crop)
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            for name in {"teacher", "student"} & method.networks.keys():
                method.networks[name](image)
        flops[arm] = counter.get_total_flops() * config.train.steps
    assert flops["student_only_equal_flops"] == flops["mst_kdnet"]


def test_sections_are_laid_over_each_other():
    base = {"train": {"steps": 3, "roles": {"a": {"lr": 1}}}, "data": {"crop": [1, 2, 3]}}
    over = {"train": {"roles": {"a": {"lr": 2}, "b": {}}}, "data": {"crop": [4]}, "name": "x"}
    assert merged(base, over) == {"train": {"steps": 3, "roles": {"a": {"lr": 2}, "b": {}}}, "data": {"crop": [4]}, "name": "x"}
    assert base["train"]["roles"] == {"a": {"lr": 1}}


@pytest.mark.parametrize(("changes", "words", "message"), [
    ({"method": "best"}, [], "'best' is no arm; arms: light, heavy"),
    ({"arms": {"light": {"tune": [{}]}, "heavy": {}}}, [], "arms differ in how many candidates they tune over"),
    ({}, ["common.train.stps=3"], "arm light: unknown key train.stps; did you mean 'steps'?"),
    ({}, ["method=light"], "method and baseline are both 'light'; name two arms"),
    ({"method": None}, [], "give method and baseline, or questions, each with its own"),
    ({"questions": {"one": {"method": "heavy", "baseline": "light"}}}, [], "give method and baseline, or questions, each with its own"),
    ({"method": None, "baseline": None, "questions": {"one": {"method": "heavy", "baseline": "lihgt"}}}, [], "questions.one: baseline: 'lihgt' is no arm"),
    ({"method": None, "baseline": None, "questions": {"one": {"method": "heavy", "baseline": "light", "arms": ["heavy"]}}}, [],
     "questions.one: arms: method heavy and baseline light belong to them"),
    ({}, ["arms.light.takes={teacher: heavy}"], "arms.light.takes.teacher: 'heavy' is no arm above it that is trained; those are: none"),
    ({}, ["arms.heavy.takes={teacher: light}"], "arms.heavy: takes teacher and is tuned; candidates have nobody to take from, leave one of the two out"),
    ({}, ["seeds=[1, 1]"], "seeds [1, 1]: give different ones from 0, none of them tuning.seed 1000"),
    ({}, ["arms.light.of=heavier"], "arms.light.of: 'heavier' is no arm that is trained; those are heavy"),
    ({}, ["arms.light.of=light"], "arms.light.of: 'light' is no arm that is trained; those are heavy"),
    ({}, ["arms.light.of=heavy", "arms.light.recipe={}"], "arms.light: changes nothing of heavy; say in its recipe how it predicts"),
    ({}, ["arms.light.of=heavy"], "arms.light: is another evaluation of heavy, with what that was tuned to; remove tune"),
    ({}, ["arms.light.block=C"], "arms.light.block: Input should be 'A' or 'B'"),
    ({}, ["seeds=[]"], "override 'seeds=[]': seeds: List should have at least 1 item"),
    ({}, ["cohort={train: 0}"], "override 'cohort={train: 0}': cohort.train"),
    ({}, ["cohrt=3"], "override 'cohrt=3': unknown key cohrt; did you mean 'cohort'?"),
])  # fmt: skip
def test_a_wrong_study_is_one_line(tmp_path, changes, words, message):
    with pytest.raises(UserError) as caught:
        load_study(write(tmp_path, **changes), words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_changes_the_arm_that_it_names_and_no_other():
    study = load_study("study_phantom", ["arms.mst_kdnet.recipe.method.weights.bce=0"])
    weights = {arm: declared.recipe["method"]["weights"]["bce"] for arm, declared in study.arms.items() if arm.startswith("mst_kdnet")}
    assert weights.pop("mst_kdnet") == 0 and set(weights.values()) == {1.0}


def test_controlled_arms_see_the_same_intensities_and_share_the_students_first_weights():
    study, students, intensities = load_study("study_phantom"), [], []
    for arm in (arm for arm, declared in study.arms.items() if declared.block == "A"):
        config = RunConfig.model_validate(run_config(study, arm, "shards", "run", 1))
        torch.manual_seed(1)
        method = build(config.method, DataFacts(SEQUENCES, LABEL_SCHEMES["brats2018"], config.data.crop))
        students.append(list(method.networks["student"].parameters()))
        intensities.append(method.intensity)
    assert len(students) == 8 and intensities.count(intensities[0]) == 8
    for other in students[1:]:
        assert all(torch.equal(a, b) for a, b in zip(students[0], other, strict=True))


@pytest.mark.parametrize(("method", "message"), [
    ({"name": "toys.two_stage", "wieght": 2}, "arm light: recipe: unknown key method.wieght; did you mean 'weight'?"),
    ({"name": "shaspec_classify"}, "arm light: its method is for classification; a study compares methods for segmentation or synthesis"),
    ({"name": "toys.copying"}, "arm heavy: its method is for segmentation and that of light for synthesis; the arms of a study share one task"),
])  # fmt: skip
def test_a_method_that_cannot_be_compared_is_refused_before_anything_is_made(tmp_path, method, message):
    arms = {"light": {"recipe": {"method": method}}, "heavy": {"recipe": {"method": {"name": "toys.two_stage"}}}}
    with pytest.raises(UserError, match=re.escape(message)):
        run_study(load_study(write(tmp_path, arms=arms)), print)
    assert not (tmp_path / "runs").exists()


def test_another_evaluation_cannot_change_what_was_trained(tmp_path):
    arms = {"light": {"recipe": {"method": {"name": "toys.copying"}}}, "heavy": {"of": "light", "recipe": {"train": {"steps": 9}}}}
    with pytest.raises(UserError, match=r"arm heavy: train.steps=9: light was trained with 3; only inference.\*, evaluate.\*, method.noise.\* can be changed"):
        run_study(load_study(write(tmp_path, arms=arms)), print)
    assert not (tmp_path / "runs").exists()


def test_one_study_at_a_time_and_another_cohort_is_refused(tmp_path):
    study = load_study(write(tmp_path))
    with alone(study.folder), pytest.raises(UserError, match="another `mstkd study`, or a run that it left behind, is at work here"):
        run_study(study, print)
    config = CohortConfig(train=3, validation=2, test=4, size=32)
    prepare_cohort(config, tmp_path, workers=1)
    with pytest.raises(UserError, match=r"cohort.test was 4 and is now 5; give the study another name=\.\.\., or remove the folder"):
        prepare_cohort(config.model_copy(update={"test": 5}), tmp_path, workers=1)


def test_the_cohort_is_made_once_and_split_as_asked(tmp_path):
    config = CohortConfig(train=3, validation=2, test=4, size=32)
    shards = prepare_cohort(config, tmp_path, workers=1)
    splits = ShardStore(shards).splits
    assert [len(side) for side in (splits.folds[0].train, splits.folds[0].val, splits.test)] == [3, 2, 4]
    assert len({*splits.folds[0].train, *splits.folds[0].val, *splits.test}) == 9
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert prepare_cohort(config, tmp_path, workers=1) == shards
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before and not (tmp_path / "nifti").exists()


def test_pairs_scans_and_tests_are_of_different_people(tmp_path):
    config = CohortConfig(train=2, validation=1, test=2, pairs={"train": 3, "validation": 1}, size=32)
    store = ShardStore(prepare_cohort(config, tmp_path, workers=1))
    splits, sides = store.splits, [(fold.train, fold.val) for fold in store.splits.folds]
    assert [(len(train), len(val)) for train, val in sides] == [(2, 1), (3, 1)] and len(splits.test) == 2
    assert len({*splits.test, *(subject for pair in sides for side in pair for subject in side)}) == config.subjects == 9
    assert store.index.sequences == ("t1_3t", "t1_7t") and store.index.scheme.name == "tissue3"


def start(recipe, *words) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen([MSTKD, "study", recipe, *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process) -> tuple[int, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out + err


def test_interrupted_it_goes_on_past_a_candidate_that_fails_and_ends_with_a_comparison(tmp_path):
    arm = {"recipe": {"method": {"name": "toys.two_stage"}}, "tune": [{"method": {"fail_at": 0}}, {"method": {"weight": 2.0}}]}
    heavy = {**arm, "recipe": {"method": {"name": "toys.two_stage"}, "train": {"steps": 6}}, "tune": [{"method": {"weight": 0.5}}, {"method": {"weight": 2.0}}]}
    recipe, folder = write(tmp_path, arms={"light": arm, "heavy": heavy}), tmp_path / "runs" / "toys"
    process = start(recipe)
    deadline = time.monotonic() + DEADLINE_S
    while not any(folder.glob("tuning/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, ended(process)
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=DEADLINE_S)[1] == []  # what their own helpers need to notice

    code, said = ended(start(recipe))
    assert code == 0, said
    tuning = json.loads((folder / "tuning.json").read_text())
    assert tuning["light"]["scores"][0] is None and "light-0: FAILED, see " in said
    for arm, found in tuning.items():
        assert len(found["scores"]) == 2 and found["scores"][found["chosen"]] == max(score for score in found["scores"] if score is not None)
        chosen = yaml.safe_load((folder / "runs" / f"{arm}-seed7" / "config.yaml").read_text())
        assert chosen["method"]["weight"] == (0.5, 2.0)[found["chosen"]] and chosen["method"]["fail_at"] == -1 and chosen["seed"] == 7
        assert chosen["train"]["steps"] == {"light": 3, "heavy": 6}[arm]
    assert {"compare.html", "compare.csv", "primary.csv"} <= {path.name for path in (folder / "comparison").iterdir()}
    tracked = runs(folder)
    below = {name: next((above for above, one in tracked.items() if one.info.run_id == run.data.tags.get("mlflow.parentRunId")), None) for name, run in tracked.items()}
    assert {name for name, above in below.items() if above == "toys"} == {"toys/tuning", "light-seed7", "heavy-seed7", "comparison"} and below["toys"] is None
    assert {name for name, above in below.items() if above == "toys/tuning"} == {"light-0", "light-1", "heavy-0", "heavy-1"}
    assert {tracked[name].info.status for name in ("toys", "toys/tuning", "comparison")} == {"FINISHED"} and tracked["light-0"].data.tags["arm"] == "light"
    assert "heavy against light" in tracked["toys"].data.tags["mlflow.note.content"] and "## Comparison" in tracked["toys"].data.tags["mlflow.note.content"]
    assert json.loads(tracked["toys"].data.tags["mlflow.loggedArtifacts"])[0]["path"] == "tables/compare.json"

    code, said = ended(start(recipe, "arms.heavy.recipe.train.steps=7"))
    assert code == 2 and "run heavy-seed7 was begun with train.steps=6 and is now asked for with 7; undo the change" in said
    code, said = ended(start(recipe, "tuning.steps=2"))
    assert code == 2 and "was begun with" in said

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/metrics.jsonl")}
    code, said = ended(start(recipe))
    assert code == 0 and "2 of 2 runs are done, 0 to go" in said
    assert len(before) == 6 and {path: path.stat().st_mtime_ns for path in before} == before
    assert {name: run.info.run_id for name, run in runs(folder).items()} == {name: run.info.run_id for name, run in tracked.items()}


def test_a_failed_run_is_named_and_the_others_have_their_turn(tmp_path):
    arms = {name: {"recipe": {"method": {"name": "toys.two_stage", "fail_at": at}}} for name, at in (("light", -1), ("heavy", 1))}
    code, said = ended(start(write(tmp_path, arms=arms)))
    assert code == 1
    assert "study toys: 1 of 2 runs failed: heavy-seed7; see " in said.splitlines()[-1] and "then give the same command again" in said
    assert (tmp_path / "runs" / "toys" / "runs" / "light-seed7" / "evaluation" / "summary.json").is_file()


def test_arms_take_networks_from_other_arms_which_come_first_and_stand_in_no_table(tmp_path):
    arms = {
        "giver": {"recipe": {"method": {"name": "toys.two_stage"}, "stages": "teacher"}},
        "light": {"recipe": {"method": {"name": "toys.two_stage"}}, "takes": {"teacher": "giver"}},
        "heavy": {"recipe": {"method": {"name": "toys.two_stage", "weight": 2.0}}, "takes": {"teacher": "giver"}},
    }  # fmt: skip
    questions = {"one": {"method": "heavy", "baseline": "light", "arms": ["light", "heavy"]}}
    recipe, folder = write(tmp_path, arms=arms, questions=questions, method=None, baseline=None), tmp_path / "runs" / "toys"
    code, said = ended(start(recipe, "arms.giver.recipe.method.fail_at=1", "name=broken"))
    assert code == 1 and all(f"{arm}-seed7: not begun, since giver-seed7 failed" in said for arm in ("light", "heavy"))
    assert "3 of 3 runs failed: giver-seed7, light-seed7, heavy-seed7" in said.splitlines()[-1]

    code, said = ended(start(recipe))
    assert code == 0, said
    runs = folder / "runs"
    assert not (runs / "giver-seed7/evaluation").exists() and not (runs / "light-seed7/teacher").exists()
    for arm in ("light", "heavy"):
        config = RunConfig.model_validate(yaml.safe_load((runs / f"{arm}-seed7/config.yaml").read_text()))
        assert config.teacher.path == {"teacher": str(runs / "giver-seed7")}
    rows = list(csv.DictReader((folder / "comparison/one/compare.csv").open()))
    assert {row["arm"] for row in rows} == {"light", "heavy"}


def test_a_study_of_synthesis_goes_from_cohort_to_comparison(tmp_path):
    method = {"name": "toys.copying", "given": ["t1", "flair"]}
    tune = [{"train": {"roles": {"both": {"optimizer": {"name": "adam", "lr": lr}}}}} for lr in (1e-4, 1e-2)]
    arms = {
        "plain": {"recipe": {"method": method}, "tune": tune}, "noisy": {"recipe": {"method": {**method, "noise": 0.2}}, "tune": tune},
        "shaken": {"of": "plain", "recipe": {"method": {"noise": 0.1}}},
    }  # fmt: skip
    common = {
        "data": {"slices": {"size": 32}, "workers": 0}, "train": {"global_batch": 2, "steps": 2, "precision": "fp32"},
        "validate": {"subsets": ["t1"], "max_cases": 1},
    }  # fmt: skip
    recipe, folder = write(tmp_path, arms=arms, common=common, method="plain", baseline="noisy"), tmp_path / "runs" / "toys"
    code, said = ended(start(recipe))
    assert code == 0, said
    tuning = json.loads((folder / "tuning.json").read_text())
    for arm, found in tuning.items():
        assert len(found["scores"]) == 2 and all(-1 < score < 1 for score in found["scores"]), (arm, found)  # SSIM
        assert found["scores"][found["chosen"]] == max(found["scores"])
    rows = list(csv.DictReader((folder / "comparison" / "compare.csv").open()))
    assert {row["arm"] for row in rows} == {"plain", "noisy", "plain teacher", "noisy teacher", "shaken", "shaken teacher", "copy"}
    assert not (folder / "runs" / "shaken-seed7").exists()
    again = folder / "runs" / "plain-seed7" / "evaluation" / "shards-test-method.noise=0.1"
    evaluated = (again / "summary.json").stat().st_mtime_ns
    (again.parent / "summary.json").unlink()  # as if it had been interrupted in that evaluation
    code, said = ended(start(recipe))
    assert code == 0 and "2 of 3 runs are done" in said and (again / "summary.json").stat().st_mtime_ns == evaluated
    assert {row["measure"] for row in rows} == {"psnr", "ssim", "local_psnr", "local_ssim", "z_gradient", "spectrum_db"} and {row["pattern"] for row in rows} >= {"t1->t2", "flair->t2"}
    tests = list(csv.DictReader((folder / "comparison" / "primary.csv").open()))
    families = {arm: [test["family"] for test in tests if test["arm"] == arm] for arm in ("plain", "shaken")}
    assert families == {"plain": ["primary"] * 2 + ["exploratory"] * 4, "shaken": ["exploratory"] * 6} and len(tests) == 12
    assert not any("Dice" in path.read_text() for path in (folder / "comparison").glob("*.csv")) and "Dice" not in said
