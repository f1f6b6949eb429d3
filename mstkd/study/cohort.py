"""The generated cohort of a study, made once."""

import json
import shutil
from pathlib import Path

from mstkd.shards.build import build
from mstkd.shards.phantom import write_phantom
from mstkd.study.config import CohortConfig


def prepare_cohort(config: CohortConfig, folder: Path, workers: int) -> Path:
    """The shard set of the cohort in `folder`, built unless it is there; the NIfTI files it came from are not kept."""
    shards = folder / "shards"
    if shards.is_dir():
        return shards
    nifti = folder / "nifti"
    if nifti.is_dir():  # written in one move, so it is whole
        names = sorted(path.name for path in nifti.iterdir())
    else:
        names = write_phantom(nifti, subjects=config.subjects, size=config.size, seed=config.seed)
    splits = folder / "splits.json"
    train, validation = names[: config.train], names[config.train : config.train + config.validation]
    splits.write_text(json.dumps({"version": 1, "folds": [{"train": train, "val": validation}], "test": names[config.train + config.validation :]}))
    build("phantom", nifti, shards, workers=workers, splits=splits, resume=True)
    shutil.rmtree(nifti)
    return shards
