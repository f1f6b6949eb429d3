"""Complete then segment, or distil a student? The steps of launch/complete_or_distil.sh, one after the other, and the table they end in."""

import json
import re

import pytest
from short_runs import TINY
from small_m2dn import SIZE, section

from mstkd.compare.run import compare
from mstkd.complete import complete
from mstkd.data.store import ShardStore
from mstkd.evaluate.run import evaluate_run
from mstkd.recipe import recipe_folder

SEGMENTATION = [*(word for word in TINY if not word.startswith("train.steps")), "train.steps=1"]
SYNTHESIS = [
    f"method={json.dumps(section(sampler={'steps': 1}))}", f"data.slices={{size: {SIZE}, min_brain: 0.1}}", "data.workers=0", "train.precision=fp32",
    "train.global_batch=2", "train.micro_batch=2", "train.steps=1", "validate={every_steps: 1, max_cases: 1, subsets: [t1]}", "inference.batch=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(one_rank, phantom_shards, tmp_path_factory):
    """Where all runs lie, trained for an update each and evaluated."""
    folder = tmp_path_factory.mktemp("out")

    def train(recipe, name, shards, words):
        one_rank.run("train_ranks.py", "run", recipe=recipe, overrides=[*words, f"name={name}-seed0", f"runs_dir={folder}", f"data.shards={shards}"])
        return folder / f"{name}-seed0"

    front = train("m2dn_phantom", "synthesis", phantom_shards, SYNTHESIS)
    train("mst_kdnet_phantom", "student", phantom_shards, SEGMENTATION)
    whole = train("teacher_full_phantom", "whole", phantom_shards, SEGMENTATION)
    complete(front, phantom_shards, folder / "completed-seed0", wanted="uniform")
    train("teacher_full_phantom", "tuned", folder / "completed-seed0", [*SEGMENTATION, f"init_from={whole}"])
    evaluate_run(folder / "student-seed0")
    for name in ("whole", "tuned"):
        evaluate_run(folder / f"{name}-seed0", data=phantom_shards, complete=front)
    return folder


def behind(name):
    return f"{name}-seed0/evaluation/shards-test-synthesis-seed0"


def test_one_table_has_all_three_over_every_subset(out, phantom_shards, tmp_path):
    found = compare([out / "student-seed0", out / behind("whole"), out / behind("tuned")], tmp_path / "comparison")
    assert len(found.arms) == 3 and found.baseline == "mst_kdnet" and len(found.patterns) == 15
    assert all(found.mean(arm, "WT").patients == len(ShardStore(phantom_shards).splits.test) for arm in found.arms)
    notes = {arm: " ".join(summary.notes) for arm, summary in found.arms.items()}
    assert [("completed by m2dn (synthesis-seed0)" in note) for note in notes.values()] == [False, True, True]
    assert not any("overlap" in note for note in notes.values())


def test_the_tuned_one_begins_with_the_whole_ones_weights_and_sees_completed_training_images(out, phantom_shards):
    log = (out / "tuned-seed0" / "logs" / "rank-0.log").read_text()
    assert int(re.search(r"init_from: (\d+) tensors taken", log)[1]) > 20 and "left as initialised" not in log
    real, made = ShardStore(phantom_shards), ShardStore(out / "completed-seed0")
    assert made.splits == real.splits
    given = {entry.measured for key, entry in made.subjects.items() if key in made.splits.folds[0].train}
    assert len(given) > 3 and all(0 < len(names) < 4 for names in given)


def test_the_script_takes_these_steps():
    words = (recipe_folder().parent / "complete_or_distil.sh").read_text()
    assert re.findall(r"^  run .*", words, re.M) == [
        '  run "$synthesis" synthesis "$shards"', '  run "$student" student "$shards"', '  run "$whole" whole "$shards"',
        '  run "$whole" tuned "$completed" "init_from=$out/whole-seed$seed"',
    ]  # fmt: skip
    assert all((recipe_folder() / f"{name}.yaml").is_file() for name in re.findall(r":-(\w+_phantom)", words))
