"""Shared by all tests: pools of ranks that live as long as the test session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rank_pool import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def one_rank():
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory):
    """A shard set of twelve small phantom subjects, made once."""
    from mstkd.shards.build import build
    from mstkd.shards.phantom import write_phantom

    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder / "nifti", subjects=12, size=32, seed=3)
    build("phantom", folder / "nifti", folder / "shards", workers=1, seed=0)
    return folder / "shards"
