"""Runs of the copying toy on small phantoms, as training leaves them."""

import csv
import json

import pytest
import yaml
from trained_run import make_run, write_run

from mstkd.evaluate.run import evaluate_run
from mstkd.run_folder import read_run_config
from mstkd.track import open_trackers

SEQUENCES = ("flair", "t1", "t1ce", "t2")
SINGLE = {"name": "toys.copying", "given": [*SEQUENCES]}
SIZE = 32  # that of the phantom's files: a slice is padded and not resampled
PAIRS = [f"{given}->{target}" for given in SEQUENCES for target in SEQUENCES if given != target]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with shards of 10 phantoms, for runs beside them."""
    folder = tmp_path_factory.mktemp("synthesis")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def run(root):
    """A tracked run that translates one sequence into another, evaluated."""
    folder = write(root, "single", SINGLE)
    open_trackers(read_run_config(folder), folder, attempt=1, tags={}, dataset={"name": "phantom", "digest": "0" * 64}).finish("FINISHED")
    evaluate_run(folder)
    return folder


def write(root, name, method, size=SIZE, **sections):
    """A run folder of the toy in single precision; `sections` of its recipe."""
    folder = write_run(root, name, method, None, {"size": size})
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"inference": {"batch": 8, "precision": "fp32"}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def read(path):
    return json.loads(path.read_text())


def read_rows(run):
    return list(csv.DictReader((run / "evaluation" / "per_case.csv").open()))
