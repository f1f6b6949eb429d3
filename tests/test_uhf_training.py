"""Stages of UHF-guided segmentation trained by the engine on two ranks: who is updated, and who stays as it is."""

import numpy as np
import pytest
from small_uhf import STAGES


ROLES = ("base", "teacher", "critic", "keeper", "student")
# Adam would blow gradients of rounding alone up to its full step
PLAIN = {"roles": {role: {"optimizer": {"name": "sgd", "lr": 1e-4, "momentum": 0.9}} for role in ROLES}}


def same(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


def learned(weights: dict) -> dict:
    """Without the running statistics of batch norms and their counters, which are each rank's own until they are saved."""
    return {key: value for key, value in weights.items() if "running_" not in key and "num_batches" not in key}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_each_stage_like_one_and_leave_the_rest_bit_for_bit(stage, one_rank, two_ranks):
    [alone] = one_rank.run("uhf_ranks.py", "train", stage=stage, zero_stage=0, **PLAIN)
    for zero in (1, 2):
        first, second = two_ranks.run("uhf_ranks.py", "train", stage=stage, zero_stage=zero, **PLAIN)
        assert first["skipped"] == 0 and all(np.isfinite(value) for value in first["figures"].values())
        for network, before in first["before"].items():
            after, others, single = (learned(found["after"][network]) for found in (first, second, alone))
            assert same(after, others) and same(before, first["after"][network]) == (network not in STAGES[stage]), network
            assert all(np.allclose(after[key], single[key], rtol=1e-4, atol=1e-5) for key in after), network
        assert first["gradients"] == alone["gradients"] == []  # of the frozen teacher, keeper and base


def test_gradients_flow_through_a_teacher_that_is_cut_over_the_ranks(two_ranks):
    (loss, whole), _ = two_ranks.run("uhf_ranks.py", "keeper_gradients", placement="replicate")
    for placement in ("zero3", "cpu"):
        for found, gradients in two_ranks.run("uhf_ranks.py", "keeper_gradients", placement=placement):
            assert found == pytest.approx(loss, rel=1e-5)
            assert all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(whole, gradients, strict=True))
