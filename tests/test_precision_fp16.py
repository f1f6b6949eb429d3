"""fp16: autocast over fp32 weights with a dynamic loss scale, under every ZeRO stage.

Most CPUs have no fp16 arithmetic and a recipe is then refused; torch computes in it all the same, slowly, and the toy is small.
"""

import pytest
import torch

from mstkd.config import load_config
from mstkd.errors import UserError
from mstkd.launch import doctor
from mstkd.precision import check_precision

SCALE = "train/loss_scale_networks"


def train(pool, folder, zero, **more) -> dict:
    return pool.run("engine_ranks.py", "train", folder=str(folder), zero=zero, precision="fp16", **more)[0]


def losses(result) -> dict[int, float]:
    return {step: row["train/loss_networks"] for step, row in result["rows"] if "train/loss_networks" in row}


def scales(result) -> list[float]:
    return [row[SCALE] for _, row in result["rows"] if SCALE in row]


def starting_at(power: int) -> dict:
    """The scale that the search begins with, as a user's DeepSpeed JSON may say."""
    return {"deepspeed": {"fp16": {"initial_scale_power": power, "loss_scale_window": 1000}}}


@pytest.fixture(scope="module")
def fp32(two_ranks, tmp_path_factory):
    """The toy's loss by step in fp32, plain and clipped."""
    folder = tmp_path_factory.mktemp("fp32")
    run = lambda name, **more: losses(two_ranks.run("engine_ranks.py", "train", folder=str(folder / name), zero=0, **more)[0])  # noqa: E731
    return {0.0: run("plain"), 0.05: run("clipped", clipping=0.05)}


@pytest.mark.parametrize("clipping", [0.0, 0.05])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_fp16_trains_like_fp32(two_ranks, fp32, tmp_path, zero, clipping):
    result = train(two_ranks, tmp_path, zero, clipping=clipping)
    got = losses(result)
    assert got.keys() == fp32[clipping].keys() and result["skipped"] == 0
    assert max(abs(got[step] - fp32[clipping][step]) for step in got) < 5e-4  # fp16 has a resolution of 1e-3; measured 1e-4
    assert got != fp32[clipping] and abs(fp32[0.0][10] - fp32[0.05][10]) > 5e-3  # so that clipping scaled gradients is seen
    assert scales(result) == [2.0**16] * 10
    assert all(row["gradient_norm/networks"] < 100 for _, row in result["rows"] if "gradient_norm/networks" in row)  # not of scaled gradients


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_overflow_is_skipped_and_halves_the_scale_and_is_no_failure(two_ranks, tmp_path, zero):
    result = train(two_ranks, tmp_path, zero, steps=20, max_skipped=0, more=starting_at(26))
    skipped, got = result["skipped"], scales(result)
    assert 5 <= skipped <= 15  # more than max_skipped: the search is none of them
    assert got[:skipped] == [2.0 ** (25 - n) for n in range(skipped)] and set(got[skipped:]) == {got[skipped - 1]}
    done = losses(result)
    assert list(done) == list(range(skipped + 1, 21)) and done[20] < done[skipped + 1]


@pytest.mark.parametrize("zero", [0, 2])
def test_a_run_that_diverges_still_ends(two_ranks, tmp_path, zero):
    reply = train(two_ranks, tmp_path, zero, steps=30, max_skipped=2, method={"nan_at": list(range(30))}, more=starting_at(4))
    assert reply.startswith("TrainingError") and "3 non-finite updates in a row" in reply


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_resume_keeps_the_scale(two_ranks, tmp_path, zero):
    more = {"more": {"deepspeed": {"fp16": {"initial_scale_power": 26, "loss_scale_window": 6}}}, "steps": 30}  # it rises again within the run
    whole = train(two_ranks, tmp_path / "whole", zero, **more)
    first = train(two_ranks, tmp_path / "cut", zero, stop_after=17, **more)
    second = train(two_ranks, tmp_path / "cut", zero, **more)
    assert scales(first) + scales(second) == scales(whole) and len(set(scales(whole)[15:])) > 1
    assert losses(first) | losses(second) == losses(whole)


def test_a_machine_without_fp16_is_refused_before_anything_is_built(one_rank, phantom_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(UserError, match="train.precision fp16: this machine's CPU does not compute in it .*; use bf16 or fp32, or train on a GPU"):
        check_precision("fp16", torch.device("cpu"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    check_precision("fp16", torch.device("cpu"))
    assert load_config("mst_kdnet_phantom", ["train.precision=fp16"]).inference.precision == "fp16"


def test_a_gpu_that_only_emulates_bf16_is_refused_and_doctor_says_the_same(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)  # what a V100 answers
    with pytest.raises(UserError, match="train.precision bf16: this GPU does not compute in it; use train.precision=fp16 or fp32"):
        check_precision("bf16", torch.device("cuda"))
    assert str(doctor._bf16(torch)).endswith("this GPU does not compute in it; use train.precision=fp16 or fp32")
    check_precision("fp16", torch.device("cuda"))
