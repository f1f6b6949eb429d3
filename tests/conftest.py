"""Shared by all tests: pools of ranks that live as long as the test session."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from devcluster import devcluster  # noqa: E402, F401  (a fixture)
from rank_pool import RankPool  # noqa: E402
from short_runs import TINY  # noqa: E402

hypothesis.settings.register_profile("any_machine", deadline=None)  # no test asserts a duration
hypothesis.settings.load_profile("any_machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Side by side (tests/run.sh) one process takes every file that needs the cluster, which waits a lot; the others go file by file."""
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "slurm" if "mark.slurm" in (config.rootpath / file).read_text() else file

    return OneCluster(config, log)


@pytest.fixture(autouse=True)
def launcher_variables_stay():
    """A test that leaves a launcher's variables behind makes every job that a later test submits believe in that launcher."""
    before = launched_as()
    yield
    assert launched_as() == before


def launched_as() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}


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


@pytest.fixture(scope="session")
def one_rank_curve(one_rank, phantom_shards, tmp_path_factory):
    """Loss terms of ten steps on one rank under ZeRO-0: [(step, {name: value})]."""
    runs = tmp_path_factory.mktemp("one-rank")
    words = [*TINY, f"data.shards={phantom_shards}", f"runs_dir={runs}", "train.zero_stage=0"]
    return one_rank.run("train_ranks.py", "run", recipe="mst_kdnet_phantom", overrides=words)[0]["curve"]
