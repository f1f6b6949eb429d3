"""Contrast equalised in three dimensions: stored once, the same wherever it is computed, and what networks are trained on."""

import numpy as np
import pytest
import torch
import yaml

from mstkd.config import DataConfig, InferenceConfig, IntensityConfig
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader
from mstkd.data.store import ShardStore
from mstkd.data.training import open_training
from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor
from mstkd.shards.build import build
from mstkd.shards.dataset import SPEC_FOLDER, DatasetSpec, load_spec
from mstkd.shards.phantom import write_phantom
from mstkd.shards.spec import CLAHE
from mstkd.shards.verify import verify

KIND = IntensityConfig(kind="clahe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cohort built with equalised contrast, and without."""
    folder = tmp_path_factory.mktemp("clahe")
    write_phantom(folder / "nifti", subjects=3, size=32, seed=5, paired_7t=True)
    spec = yaml.safe_load((SPEC_FOLDER / "phantom_7t.yaml").read_text()) | {"name": "equalised", "preprocessing": {"clahe": True}}
    (folder / "equalised.yaml").write_text(yaml.safe_dump(spec))
    for name, of in (("with", folder / "equalised.yaml"), ("without", "phantom_7t")):
        build(of, folder / "nifti", folder / name)
    return folder / "with", folder / "without"


def test_the_set_holds_it_beside_the_plain_volumes(folders):
    store, plain = (ShardStore(folder) for folder in folders)
    assert store.index.extra_members == (CLAHE,) and plain.index.extra_members == ()
    verify(folders[0])
    for key in store.subjects:
        sample, equal = store.subject(key), store.equalised(key)
        assert equal.dtype == np.float16 and equal.shape == sample.image.shape and np.array_equal(sample.image, plain.subject(key).image)
        assert equal.min() == 0 and 0.9 < equal.max() <= 1 and not equal[:, sample.brain == 0].any()


def test_it_is_computed_anew_as_it_was_stored(folders):
    store = ShardStore(folders[0])
    sample = store.subject(next(iter(store.subjects)))
    again = Intensity(KIND).prepared(sample.image, sample.brain, sample.meta, store.index.sequences)
    assert np.abs(again.astype(np.float32) - store.equalised(sample.meta.subject)).max() < 0.02  # z-scores are kept in half precision


def test_it_spreads_what_is_locally_alike(folders):
    store = ShardStore(folders[0])
    sample = store.subject(next(iter(store.subjects)))
    unit = Intensity(IntensityConfig(kind="percentile")).apply(sample.image, sample.brain, sample.meta, store.index.sequences)
    white = sample.label == 3
    assert store.equalised(sample.meta.subject)[0][white].astype(np.float32).std() > unit[0][white].std()


def test_training_and_prediction_see_the_same(folders):
    config = DataConfig(shards=[{"path": str(folders[0])}], crop=(32, 32, 32), augment={"flip_prob": 0}, workers=0)
    training = open_training(config, 0, True)
    [[(_, batch)]] = TrainLoader(training, config, Intensity(KIND), global_batch=1, micro_batch=1, total_steps=1)
    store = ShardStore(folders[0])
    sample = store.subject(batch.subject[0])

    class Equalised:
        intensity = KIND

    volume = Predictor(Equalised(), store.index.sequences, (32, 32, 32), InferenceConfig(), torch.device("cpu")).volume(sample.image, sample.brain, sample.meta)
    assert volume.image.shape == batch.image.shape and float((volume.image - batch.image).abs().max()) < 0.02


def test_a_set_without_it_is_refused(folders):
    config = DataConfig(shards=[{"path": str(folders[1])}], crop=(32, 32, 32), workers=0)
    with pytest.raises(UserError, match=r"without: has no clahe.npy; build it with preprocessing: \{clahe: true\} in the spec"):
        list(TrainLoader(open_training(config, 0, True), config, Intensity(KIND), global_batch=1, micro_batch=1, total_steps=1))


def test_a_spec_that_does_not_ask_for_it_has_the_digest_it_had():
    assert "clahe" not in load_spec("brats2018").model_dump_json() and DatasetSpec.model_validate(load_spec("ibsr18").model_dump()).preprocessing.clahe
