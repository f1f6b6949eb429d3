"""Moving averages of a role's networks: the mean teacher, on any rank count and ZeRO stage, through a resume."""

import numpy as np
import pytest
import torch
from engine_ranks import SEQUENCES
from safetensors.numpy import load_file
from test_engine import curve

from mstkd.methods import DataFacts, build

MEAN = {"name": "toys.mean_teacher"}


def close(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, atol=tolerance, err_msg=key)


@pytest.fixture(scope="module")
def reference(one_rank, tmp_path_factory):
    return one_rank.run("engine_ranks.py", "train", folder=str(tmp_path_factory.mktemp("reference")), zero=0, method=MEAN)[0]


def first_weights(method: dict) -> dict:
    torch.manual_seed(0)
    return {key: value.numpy() for key, value in build(method, DataFacts(SEQUENCES, None, (8, 8, 8))).networks["student"].state_dict().items()}


@pytest.mark.parametrize(("ramp", "decays"), [((0, 1), (0, 1 / 2, 2 / 3, 3 / 4)), ((1, 10), (1 / 10, 2 / 11, 3 / 12, 4 / 13)), ((8, 9), (8 / 9, 0.9, 0.9, 0.9))])
def test_the_average_is_what_the_formula_says(ramp, decays, one_rank, tmp_path):
    """Every step's weights from runs that end there; decay 0.9, less in the first steps. It begins as the network does."""
    method = {**MEAN, "batch_norm": True, "ramp": ramp}
    expected = first_weights(method) if ramp[0] else None
    for step, decay in enumerate(decays, start=1):
        result = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path / str(step)), zero=0, steps=step, method=method)[0]
        student = result["weights"]["student"]
        expected = student if expected is None else {k: decay * expected[k] + (1 - decay) * v for k, v in student.items()}
        buffers = {key for key in student if "running" in key or "tracked" in key}
        close({k: v for k, v in result["weights"]["teacher"].items() if k not in buffers}, {k: v for k, v in expected.items() if k not in buffers}, 1e-6)
        for key in buffers:  # copied
            np.testing.assert_array_equal(result["weights"]["teacher"][key], student[key])
    assert np.abs(result["weights"]["teacher"]["0.weight"] - student["0.weight"]).max() > 1e-4


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_average_is_the_same_on_two_ranks_and_under_zero(zero, reference, two_ranks, tmp_path):
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, best=True, method=MEAN)
    expected, got = curve(reference), curve(results[0])
    assert max(abs(expected[step] - got[step]) for step in expected) < 1e-5
    close(results[0]["weights"]["teacher"], reference["weights"]["teacher"], 1e-5)
    for key, value in results[0]["weights"]["teacher"].items():
        np.testing.assert_array_equal(value, results[1]["weights"]["teacher"][key])
    best = tmp_path / (tmp_path / "best").read_text().strip()
    kept = load_file(best / "networks.safetensors")  # what evaluate and predict read
    assert {key.split(".")[0] for key in kept} == {"student", "teacher"}
    if best.name == (tmp_path / "latest").read_text().strip():
        close({k.removeprefix("teacher."): v for k, v in kept.items() if k.startswith("teacher.")}, results[0]["weights"]["teacher"], 0)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_resume_takes_the_average_up_again(zero, two_ranks, tmp_path):
    whole = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "whole"), zero=zero, method=MEAN)[0]
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "cut"), zero=zero, method=MEAN, stop_after=4)
    rest = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "cut"), zero=zero, method=MEAN)[0]
    assert curve(rest) == {step: value for step, value in curve(whole).items() if step > 4}  # the loss holds the average's output
    close(rest["weights"]["teacher"], whole["weights"]["teacher"], 0)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_another_rank_count_goes_on_with_the_average(zero, two_ranks, one_rank, tmp_path):
    whole = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "whole"), zero=zero, method=MEAN)[0]
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "cut"), zero=zero, method=MEAN, stop_after=4)
    rest = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path / "cut"), zero=zero, method=MEAN)[0]
    assert max(abs(curve(rest)[step] - curve(whole)[step]) for step in range(5, 11)) < 1e-5


def test_running_statistics_of_the_average_are_the_same_on_all_ranks(two_ranks, tmp_path):
    first, second = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), method={**MEAN, "batch_norm": True})
    close(first["weights"]["teacher"], second["weights"]["teacher"], 0)


def test_a_skipped_update_leaves_the_average_alone(two_ranks, tmp_path):
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=1, method={**MEAN, "nan_at": [3]})
    assert all(result["skipped"] == 1 for result in results)
    assert all(np.isfinite(v).all() for v in results[0]["weights"]["teacher"].values())


def test_a_damaged_average_is_found_by_its_checksum(two_ranks, tmp_path):
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), method=MEAN, every_steps=3, stop_after=7)
    average = tmp_path / "step-00000007/networks/averages.safetensors"
    average.write_bytes(average.read_bytes()[:-1] + b"!")
    again = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), method=MEAN, every_steps=3)[0]
    assert min(curve(again)) == 7  # from step 6
