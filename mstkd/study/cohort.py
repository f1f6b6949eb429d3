"""The generated cohort of a study, made once."""

import json
import shutil
from pathlib import Path

from mstkd.errors import UserError
from mstkd.files import write_json
from mstkd.shards.build import build
from mstkd.shards.phantom import write_phantom
from mstkd.study.config import CohortConfig


def prepare_cohort(config: CohortConfig, folder: Path, workers: int) -> Path:
    """The shard set of the cohort in `folder`, built unless it is there; the NIfTI files it came from are not kept.

    Raises UserError if another cohort was begun there.
    """
    shards, noted = folder / "shards", folder / "cohort.json"
    asked = config.model_dump(mode="json")
    if noted.is_file() and (before := CohortConfig(**json.loads(noted.read_text())).model_dump(mode="json")) != asked:
        key = next(key for key in asked if before.get(key) != asked[key])
        raise UserError(f"{folder}: cohort.{key} was {before.get(key)} and is now {asked[key]}; give the study another name=..., or remove the folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(noted, asked)
    if shards.is_dir():
        return shards
    nifti = folder / "nifti"
    if nifti.is_dir():  # written in one move, so it is whole
        names = sorted(path.name for path in nifti.iterdir())
    else:
        names = write_phantom(nifti, subjects=config.subjects, size=config.size, seed=config.seed, paired_7t=config.pairs is not None)
    splits, (folds, test) = folder / "splits.json", config.groups(names)
    write_json(splits, {"version": 1, "folds": folds, "test": test})
    build("phantom_7t" if config.pairs else "phantom", nifti, shards, workers=workers, splits=splits, resume=True)
    shutil.rmtree(nifti)
    return shards
