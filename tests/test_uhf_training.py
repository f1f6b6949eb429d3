"""Stages of UHF-guided segmentation trained by the engine on two ranks: who is updated, and who stays as it is."""

import numpy as np
import pytest
from small_uhf import STAGES


def same(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_each_stage_and_leave_the_rest_bit_for_bit(stage, zero, two_ranks):
    first, second = two_ranks.run("uhf_ranks.py", "train", stage=stage, zero_stage=zero)
    assert first["skipped"] == 0 and all(np.isfinite(value) for value in first["figures"].values())
    for network, before in first["before"].items():
        if stage != "base":  # its batch norms' running statistics are averaged when they are saved
            assert same(first["after"][network], second["after"][network]) or network == "student"
        assert same(before, first["after"][network]) == (network not in STAGES[stage]), network
    assert first["gradients"] == []  # of the frozen teacher and keeper


def test_gradients_flow_through_a_teacher_that_is_cut_over_the_ranks(two_ranks):
    (loss, whole), _ = two_ranks.run("uhf_ranks.py", "keeper_gradients", placement="replicate")
    for placement in ("zero3", "cpu"):
        for found, gradients in two_ranks.run("uhf_ranks.py", "keeper_gradients", placement=placement):
            assert found == pytest.approx(loss, rel=1e-5)
            assert all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(whole, gradients, strict=True))
