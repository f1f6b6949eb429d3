"""A shard set as nnU-Net's raw data: what comes back when it is read as such, and what is refused."""

import json

import nibabel as nib
import numpy as np
import pytest

from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.evaluate.label_files import evaluate_predictions
from mstkd.shards.build import build
from mstkd.shards.nnunet_export import export_nnunet


@pytest.fixture(scope="module")
def exported(phantom_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("raw") / "Dataset501_Phantom"
    return out, export_nnunet(phantom_shards, out)


def test_the_export_reads_back_as_the_same_cases(phantom_shards, exported, tmp_path):
    out, counts = exported
    store = ShardStore(phantom_shards)
    assert counts == {"Tr": len(store.subjects) - len(store.splits.test), "Ts": len(store.splits.test)} and counts["Ts"]
    build("nnunet", out, tmp_path / "shards")
    again = ShardStore(tmp_path / "shards")
    assert again.index.sequences == store.index.sequences and set(again.subjects) == set(store.subjects) - set(store.splits.test)
    renumbered = np.array([0, 1, 2, 0, 3], np.uint8)  # brats2018 has 0, 1, 2, 4
    for key in again.subjects:
        ours, theirs = store.subject(key), again.subject(key)
        assert np.array_equal(ours.brain, theirs.brain) and np.array_equal(renumbered[ours.label], theirs.label)
        assert np.abs(ours.image.astype(np.float32) - theirs.image.astype(np.float32)).max() < 2e-2  # float16 of z-scores up to 8
        assert ours.meta.original_affine == theirs.meta.original_affine and ours.meta.orientation == theirs.meta.orientation


def test_dataset_json_has_the_regions_and_the_folds(phantom_shards, exported):
    out, _ = exported
    described = json.loads((out / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "flair", "1": "t1", "2": "t1ce", "3": "t2"}
    assert described["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": 3} and described["regions_class_order"] == [2, 1, 3]
    folds = json.loads((out / "splits_final.json").read_text())
    assert [fold["val"] for fold in folds] == [list(fold.val) for fold in ShardStore(phantom_shards).splits.folds]


def test_predictions_on_it_are_scored_against_its_labels(exported, tmp_path):
    out, counts = exported
    (tmp_path / "pred").mkdir()
    for path in (out / "labelsTs").iterdir():
        nib.save(nib.load(path), tmp_path / "pred" / path.name)
    summary = evaluate_predictions(tmp_path / "pred", out / "labelsTs", "nnunet", tmp_path / "scores")
    assert summary["mean"]["WT"]["dice"] == summary["mean"]["ET"]["dice"] == 1.0 and summary["mean"]["TC"]["n"] == counts["Ts"]


def test_what_cannot_be_exported_is_refused(phantom_shards, exported, tmp_path):
    out, _ = exported
    with pytest.raises(UserError, match="exists already"):
        export_nnunet(phantom_shards, out)
    index = json.loads((phantom_shards / "index.json").read_text())
    (tmp_path / "set").mkdir()
    for path in phantom_shards.iterdir():
        (tmp_path / "set" / path.name).symlink_to(path)
    (tmp_path / "set" / "index.json").unlink()
    first = index["shards"][0]["subjects"][0]
    first["sequences"] = first["sequences"][:2]
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"subject {first['subject']} lacks t1ce.*mstkd predict"):
        export_nnunet(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
