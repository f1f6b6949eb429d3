"""The tests' own ranks: one that fails alone is told at once, and the others do not wait for it for ever."""

import os

import pytest
import rank_pool
from rank_pool import RankPool


def fail_alone() -> None:
    import torch

    if os.environ["RANK"] == "0":
        raise ValueError("only here")
    torch.distributed.barrier()


def rank() -> int:
    return int(os.environ["RANK"])


def test_a_rank_that_fails_alone_ends_the_call_and_the_next_one_has_new_ranks(monkeypatch):
    monkeypatch.setattr(rank_pool, "OTHERS_S", 1.0)
    pool = RankPool(2)
    try:
        with pytest.raises(AssertionError, match="(?s)rank 0 failed:.*only here"):
            pool.run("test_rank_pool.py", "fail_alone")
        assert pool.run("test_rank_pool.py", "rank") == [0, 1]
    finally:
        pool.close()
