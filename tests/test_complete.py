"""Cases completed with a synthesis run: the NIfTI files and the shard sets that come of it, and what is refused."""

import json
import shutil
import sys
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from tiny_shards import write_set
from trained_run import make_run, write_run

from mstkd.complete import Given, complete
from mstkd.config import ValidateConfig
from mstkd.data.store import ShardStore
from mstkd.data.training import open_stores
from mstkd.engine.environment import Ranks
from mstkd.errors import UserError
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.validation import Validation
from mstkd.launch.cli import main
from mstkd.run_folder import read_run_config
from mstkd.shards.layout import write_model
from mstkd.shards.spec import read_index, read_splits
from mstkd.shards.splits import counted_splits
from mstkd.shards.verify import verify
from mstkd.trained_run import open_run

SEQUENCES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds phantoms as files and shards, a run that copies the one sequence that it is given, and a segmentation."""
    folder = tmp_path_factory.mktemp("complete")
    make_run(folder)
    write_run(folder, "copying", {"name": "toys.copying", "given": ["flair", "t2", "t1ce", "t1"]}, None, {"size": 32})
    return folder


@pytest.fixture(scope="module")
def run(root):
    return root / "runs" / "copying"


@pytest.fixture(scope="module")
def completed(root, run):
    complete(run, root / "shards", root / "completed", wanted="drawn", seed=3)
    return root / "completed"


def cases(root, folder, lacking):
    """Copies of phantom cases without some files: number -> sequences that it lacks."""
    for number, names in lacking.items():
        key = f"Phantom_{number:04d}"
        source = next((root / "nifti").rglob(f"{key}_flair.nii.gz")).parent
        shutil.copytree(source, folder / key)
        for name in names:
            (folder / key / f"{key}_{name}.nii.gz").unlink()
    return folder


def normalised(root, key, name):
    """A sequence of a stored subject in [0, 1], 0 outside the brain, on the file's own grid and axes (LPS)."""
    sample = ShardStore(root / "shards").subject(key)
    stats = sample.meta.stats[name]
    raw = sample.image[SEQUENCES.index(name)].astype(np.float32) * stats.std + stats.mean
    unit = np.clip((raw - stats.p0_1) / (stats.p99_9 - stats.p0_1), 0, 1) * (sample.brain > 0)
    whole = np.zeros(sample.meta.original_shape, np.float32)
    whole[tuple(slice(*side) for side in sample.meta.crop_box)] = unit
    return whole[::-1, ::-1]


def test_missing_sequences_are_written_beside_nothing_else(root, run, tmp_path):
    source = cases(root, tmp_path / "in", {0: ["t1", "t1ce"], 1: []})
    said = complete(run, source, tmp_path / "out")
    assert said == "2 synthetic volumes"
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = [f"Phantom_0000/Phantom_0000_{name}_synthetic" for name in ("t1", "t1ce")]
    assert files == {"predictions.json", *(f"{name}{ending}" for name in names for ending in (".nii.gz", ".json"))}
    noted = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert noted == {"Phantom_0000": {"given": "flair", "made": ["t1", "t1ce"]}, "Phantom_0001": {"given": "flair", "made": []}}


def test_a_written_volume_lies_where_its_source_does_and_says_what_it_is(root, run, tmp_path):
    source = cases(root, tmp_path / "in", {0: ["flair", "t1"]})
    complete(run, source, tmp_path / "out")
    path = tmp_path / "out" / "Phantom_0000" / "Phantom_0000_t1_synthetic.nii.gz"
    made, real = nib.load(path), nib.load(source / "Phantom_0000" / "Phantom_0000_t2.nii.gz")
    assert made.get_data_dtype() == np.float32 and np.array_equal(made.affine, real.affine) and nib.aff2axcodes(made.affine) == ("L", "P", "S")
    # the toy copies T2, the first of what it prefers that there is; the box may be that of another union of volumes
    difference = np.abs(made.get_fdata() - normalised(root, "Phantom_0000", "t2"))
    assert np.quantile(difference, 0.99) < 2e-3 and made.get_fdata().max() > 0.9
    assert b"SYNTHETIC" in made.header["descrip"].tobytes()
    sidecar = json.loads(path.with_suffix("").with_suffix(".json").read_text())
    assert sidecar["synthetic"] is True and sidecar["given"] == "t2" and "unknown" in sidecar["scale"]


def test_the_user_chooses_what_is_given(root, run, tmp_path):
    source = cases(root, tmp_path / "in", {0: ["t2"]})
    complete(run, source, tmp_path / "out", wanted="t1ce")
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["Phantom_0000"]["given"] == "t1ce"
    with pytest.raises(UserError, match="Phantom_0000: lacks t2, which --given asks for"):
        complete(run, source, tmp_path / "other", wanted="t2")
    with pytest.raises(UserError, match="--given t1.t2: this run's network takes flair, t2, t1ce, t1"):
        complete(run, source, tmp_path / "other", wanted="t1+t2")
    with pytest.raises(UserError, match="--given: subset 'dwi'.*or give drawn"):
        complete(run, source, tmp_path / "other", wanted="dwi")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))


def test_a_completed_set_is_sound_and_marked(root, completed):
    verify(completed)
    ours, theirs = ShardStore(root / "shards"), ShardStore(completed)
    assert theirs.splits == ours.splits and (completed / "fingerprint.json").is_file()
    drawn = {key: entry.measured for key, entry in theirs.subjects.items()}
    assert all(len(names) == 1 for names in drawn.values()) and len(set(drawn.values())) > 1
    for key, (name,) in drawn.items():
        real, made = ours.subject(key), theirs.subject(key)
        assert made.meta.sequences == SEQUENCES and set(made.meta.synthetic) == {*SEQUENCES} - {name}
        given = SEQUENCES.index(name)
        assert np.array_equal(real.image[given], made.image[given]) and real.meta.stats[name] == made.meta.stats[name]
        assert np.array_equal(real.label, made.label) and np.array_equal(real.brain, made.brain)
        inside = made.brain > 0
        for channel in {0, 1, 2, 3} - {given}:  # copies of the given one
            voxels = made.image[channel][inside].astype(np.float32)
            assert abs(voxels.mean()) < 2e-3 and abs(voxels.std() - 1) < 2e-3 and not made.image[channel][~inside].any()
            assert np.corrcoef(voxels, made.image[given][inside].astype(np.float32))[0, 1] > 0.98
            stats = made.meta.stats[SEQUENCES[channel]]
            assert 0 <= stats.min < stats.max <= 1


def test_any_subset_can_be_drawn_and_each_is_of_what_the_subject_has(root):
    many = open_run(write_run(root, "many", {"name": "toys.copying"}, None, {"size": 32}), tasks=("synthesis",))
    draw, names = Given(many, "uniform", seed=1), [f"subject-{n}" for n in range(1400)]
    counts = Counter(draw(name, (True,) * 4) for name in names)
    assert len(counts) == 14 and all(60 < count < 145 for count in counts.values())  # every one that leaves something out
    assert [draw(name, (True,) * 4) for name in names] == [Given(many, "uniform", seed=1)(name, (True,) * 4) for name in names]
    assert len({Given(many, "uniform", seed=seed)(names[0], (True,) * 4) for seed in range(30)}) > 5
    assert {draw(name, (True, False, True, False)) for name in names} == {(True, False, False, False), (False, False, True, False), (True, False, True, False)}
    single = Given(open_run(root / "runs" / "copying", tasks=("synthesis",)), "uniform")
    assert {single(name, (True, True, False, False)) for name in names} == {(True, False, False, False), (False, True, False, False)}


def test_without_a_choice_what_was_measured_stays(run, tmp_path):
    write_set(tmp_path / "set", [["a", "b"], ["c"]], val=("a",), test=("c",), present={"b": ("flair", "t1"), "c": ("t1",)})
    complete(run, tmp_path / "set", tmp_path / "out")
    before, after = ShardStore(tmp_path / "set"), ShardStore(tmp_path / "out")
    assert {key: entry.synthetic for key, entry in after.subjects.items()} == {"a": (), "b": ("t1ce", "t2"), "c": ("flair", "t1ce", "t2")}
    for key, entry in before.subjects.items():
        for name in entry.sequences:
            channel = SEQUENCES.index(name)
            assert np.array_equal(before.subject(key).image[channel], after.subject(key).image[channel])


def test_the_same_seed_completes_alike(root, run, completed, tmp_path):
    complete(run, root / "shards", tmp_path / "again", wanted="drawn", seed=3)
    complete(run, root / "shards", tmp_path / "other", wanted="drawn", seed=4)
    assert read_index(tmp_path / "again") == read_index(completed) != read_index(tmp_path / "other")


def test_synthetic_sequences_can_be_hidden(root, completed):
    config = read_run_config(root / "runs" / "toy").data
    hidden = config.model_copy(update={"shards": [config.shards[0].model_copy(update={"path": str(completed)})], "synthetic": "hide"})
    (store,) = open_stores(hidden)
    for key in store.subjects:
        assert store.subject(key).meta.sequences == store.subjects[key].sequences == store.subjects[key].measured and len(store.subjects[key].measured) == 1


def test_a_segmentation_is_scored_on_what_each_case_of_the_set_has(root, completed):
    run = root / "runs" / "toy"
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe |= {"name": "downstream", "evaluate": recipe["evaluate"] | {"given": "present", "assd": True}}
    recipe["data"] |= {"shards": [{"path": str(completed), "repeat": 1}], "synthetic": "hide"}
    shutil.copytree(run, root / "runs" / "downstream")
    (root / "runs" / "downstream" / "config.yaml").write_text(yaml.safe_dump(recipe))
    summary = evaluate_run(root / "runs" / "downstream")
    assert list(summary["subsets"]) == ["present"] and summary["mean"]["WT"]["n"] == len(read_splits(completed).test)
    assert summary["mean"]["WT"]["assd_mm"] > 0
    assert evaluate_run(root / "runs" / "downstream", data=completed) == summary  # the run's own set, shown as its recipe says
    assert not (root / "runs" / "downstream" / "evaluation" / f"{completed.name}-test").exists()


def test_a_validation_gives_each_case_what_it_has_or_says_that_no_case_has_what_was_asked_for(root, completed):
    config = read_run_config(root / "runs" / "toy")
    hidden = config.data.model_copy(update={"shards": [config.data.shards[0].model_copy(update={"path": str(completed)})], "synthetic": "hide"})
    config = config.model_copy(update={"data": hidden, "evaluate": config.evaluate.model_copy(update={"given": "present"})})
    ranks, stores, method = Ranks(0, 1, 0, torch.device("cpu")), open_stores(hidden), open_run(root / "runs" / "toy").method

    def validated(subsets):
        return Validation(config.model_copy(update={"validation": ValidateConfig(subsets=subsets)}), stores, ranks)

    found = validated(None)(method, lambda: False)
    assert 0 <= found["score"] <= 1 and "dice_present" in found
    assert validated(["flair", "t1", "t1ce", "t2"])(method, lambda: False, complete=True) is None  # no case has every sequence
    with pytest.raises(UserError, match=r"validate.subsets: none of the \d+ validation cases has .*; set validate.subsets=null, and evaluate.given=present"):
        validated(["flair+t1+t1ce+t2"])


def test_the_completed_set_takes_other_splits(root, run, tmp_path):
    write_model(tmp_path / "down.json", counted_splits(root / "shards", 2, 1, 1, within=("val", "test")))
    complete(run, root / "shards", tmp_path / "out", wanted="flair", splits=tmp_path / "down.json")
    assert json.loads((tmp_path / "out" / "splits.json").read_text()) == json.loads((tmp_path / "down.json").read_text())
    trained = {*read_splits(root / "shards").folds[0].train}
    downstream = read_splits(tmp_path / "out")
    assert not trained & {*downstream.folds[0].train, *downstream.folds[0].val, *downstream.test}
    seen = {"version": 1, "folds": [{"train": [downstream.test[0]], "val": [downstream.folds[0].val[0]]}], "test": [min(trained)]}
    (tmp_path / "seen.json").write_text(json.dumps(seen))
    with pytest.raises(UserError, match=f"test subject {min(trained)}: copying was trained or validated on {min(trained)} .*choose others with --splits"):
        complete(run, root / "shards", tmp_path / "third", splits=tmp_path / "seen.json")
    other = shutil.copytree(root / "shards", tmp_path / "reversed")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "sequences": index["sequences"][::-1]}))
    with pytest.raises(UserError, match="reversed: has sequences t2, t1ce, t1, flair; the run was trained on flair, t1, t1ce, t2"):
        complete(run, other, tmp_path / "third")
    with pytest.raises(UserError, match="--splits: .* is no shard set"):
        complete(run, root / "nifti", tmp_path / "third", splits=tmp_path / "down.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/toy", "--given", "flair"], "--given: is for synthesis runs"),
        (["runs/copying", "--postprocess", "cc+et"], "--postprocess: is for label maps"),
        (["runs/copying", "--output", "shards"], "shards: exists already"),
    ],
)
def test_options_of_the_other_task_are_refused(root, monkeypatch, capsys, words, message):
    monkeypatch.chdir(root)
    output = [] if "--output" in words else ["--output", "out"]
    with pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "argv", ["mstkd", "predict", *words, "--input", "shards", *output])
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err and not (root / "out").exists()
